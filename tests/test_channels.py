"""Runs on images that are not 8-bit RGB, from the tokenizer to every use of the
weights.
"""

import json
import re

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from refusals import refused
from test_pixel_format import write_png_16
from tiny_channels import four_channel_pairs, four_channels, gray_12_bits
from tiny_runs import (
    as_flags,
    assert_same_weights,
    checkpoint,
    finetuning_flags,
    kill_after,
    pretraining_flags,
    segmentation_flags,
    student,
    vqkd_flags,
)
from torch.nn import functional as F

import encode_images
import export_checkpoint
import extract_features
import hubconf
import modeling_finetune
import modeling_vqkd
import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_segmentation_finetuning
import run_vqkd_training
import visualize_attention
import visualize_codebook
import visualize_reconstruction
from checkpoint_io import weight_files
from data_pipeline.pixel_format import PixelFormat
from errors import ParameterError
from layers.hog import compute_hog
from pretrained import open_backbone
from transforms import eval_view, normalization_of
from vqkd_teachers import build_teacher

FOUR = [*as_flags(in_chans=4), "--image_range", "0", "4095"]
GRAY = as_flags(in_chans=1, image_range="auto", mean_std="auto")
PICTURES = as_flags(image_freq=1)


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    return gray_12_bits(tmp_path_factory.mktemp("gray"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return four_channels(tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def gray_tokenizer(gray, tmp_path_factory):
    out = tmp_path_factory.mktemp("gray_vqkd")
    run_vqkd_training.main(vqkd_flags(gray, out, *GRAY, *PICTURES, *as_flags(eval_data_path=gray)))
    return out / "checkpoint.pth"


@pytest.fixture(scope="module")
def four_tokenizer(four, tmp_path_factory):
    out = tmp_path_factory.mktemp("four_vqkd")
    run_vqkd_training.main(vqkd_flags(four, out, *FOUR, *PICTURES, *as_flags(mean_std="auto")))
    return out / "checkpoint.pth"


@pytest.fixture(scope="module")
def four_student(four, four_tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("four_student")
    more = [*FOUR, *PICTURES, *as_flags(mean_std="auto", knn_freq=1, knn_data_path=split(four, out))]
    run_beitv2_pretraining.main(pretraining_flags(four, out, four_tokenizer, *more))
    return out / "checkpoint.pth"


def split(folder, out):
    """train/ and val/, both of all images."""
    for name in ("train", "val"):
        (out / "knn").mkdir(exist_ok=True)
        (out / "knn" / name).symlink_to(folder)
    return out / "knn"


def stored_flags(path):
    return {name: checkpoint(path)["args"][name] for name in ("in_chans", "image_range", "mean_std")}


# ── the tokenizer and pretraining ──


def test_12_bit_gray_finds_its_range_and_keeps_it(gray_tokenizer, gray, tmp_path, capsys):
    flags = stored_flags(gray_tokenizer)
    low, high = flags["image_range"]
    values = np.stack([np.asarray(Image.open(path)) for path in sorted(gray.glob("*/*.png"))])
    assert (low, high) == pytest.approx(tuple(np.percentile(values, (0.1, 99.9))), rel=1e-5)
    assert len(flags["mean_std"]) == 2
    weights = checkpoint(gray_tokenizer)["model"]
    assert weights["encoder.patch_embed.proj.weight"].shape[1] == 1
    assert weights["decode_task_layer.2.bias"].shape == (36,)  # HOG of one channel
    # the student takes the range of its tokenizer
    run_beitv2_pretraining.main(pretraining_flags(gray, tmp_path, gray_tokenizer, *GRAY, *PICTURES))
    assert stored_flags(tmp_path / "checkpoint.pth")["image_range"] == flags["image_range"]
    out = capsys.readouterr().out
    assert re.search(
        rf"pixels     1 channel, range {low:g} to {high:g} \(of the tokenizer\), mean \S+, std \S+ \(of 16",
        out,
    )


@pytest.mark.slow
def test_resumption_is_exact_and_measures_nothing_again(gray, gray_tokenizer, tmp_path, monkeypatch, capsys):
    flags = [*GRAY, *as_flags(save_ckpt_steps=1)]
    run_beitv2_pretraining.main(pretraining_flags(gray, tmp_path / "whole", gray_tokenizer, *flags))
    with monkeypatch.context() as patched:
        kill_after(3, patched)
        with pytest.raises(KeyboardInterrupt):
            run_beitv2_pretraining.main(pretraining_flags(gray, tmp_path / "cut", gray_tokenizer, *flags))
    capsys.readouterr()
    run_beitv2_pretraining.main(pretraining_flags(gray, tmp_path / "cut", gray_tokenizer, *flags))
    out = capsys.readouterr().out
    assert "mean" in out and "(of the checkpoint)" in out and "changed" not in out
    assert_same_weights(tmp_path / "whole" / "checkpoint.pth", tmp_path / "cut" / "checkpoint.pth")
    kept = stored_flags(tmp_path / "cut" / "checkpoint.pth")
    assert kept == stored_flags(tmp_path / "whole" / "checkpoint.pth")


def test_four_channels_pretrain(four_student):
    content = checkpoint(four_student)
    assert content["model"]["patch_embed.proj.weight"].shape[1] == 4
    assert content["data"]["images"] == 16  # .npy and .tif
    assert len(content["args"]["mean_std"]) == 8
    assert (four_student.parent / "pictures").is_dir()


def test_an_rgb_tokenizer_sees_the_channels_it_is_told(four, tokenizer_weight, tmp_path, capsys):
    flags = pretraining_flags(four, tmp_path, tokenizer_weight, *FOUR)
    assert "encodes images of 3 channels, not 4" in refused(run_beitv2_pretraining.main, flags, capsys)
    run_beitv2_pretraining.main([*flags, "--teacher_channels", "2", "1", "0"])
    assert "was trained with no --image_range, this run has --image_range 0 4095" in capsys.readouterr().out


def test_pixels_are_a_target_of_any_channels(four, tmp_path):
    more = [*FOUR, *PICTURES, *as_flags(target="pixels", epochs=1)]
    flags = pretraining_flags(four, tmp_path, tmp_path / "none")
    run_beitv2_pretraining.main([*flags, *more])
    assert checkpoint(tmp_path / "checkpoint.pth")["model"]["lm_head.bias"].shape == (4 * 16 * 16,)


def test_hog_is_of_each_channel():
    x = torch.rand(2, 5, 32, 32)
    third = compute_hog(x).unflatten(-1, (5, 36))[:, :, 2]
    assert torch.allclose(F.normalize(third, dim=-1), compute_hog(x[:, 2:3]), atol=1e-5)
    assert build_teacher("hog", grid=2, in_chans=5).targets(x).shape == (2, 4, 5 * 36)


def test_a_teacher_of_rgb_sees_three_channels():
    x = torch.rand(2, 4, 32, 32)
    name = "timm:vit_tiny_patch16_224"
    with pytest.raises(ParameterError, match="`teacher_channels` 0 1 2"):
        build_teacher(name, "random", 32, in_chans=4)
    chosen = build_teacher(name, "random", 32, in_chans=4, channels=[3, 0, 0])
    plain = build_teacher(name, "random", 32)
    assert torch.equal(chosen.targets(x), plain.targets(x[:, [3, 0, 0]]))


# ── uses of the weights ──


def test_fine_tuning_and_its_evaluation(four, four_student, tmp_path, capsys):
    flags = finetuning_flags(four, tmp_path, *as_flags(finetune=four_student, in_chans=4))
    run_class_finetuning.main([*flags, *as_flags(image_range="auto", mean_std="auto")])
    out = capsys.readouterr().out
    assert "--aa rand-m9-mstd0.5-inc1 is of 8-bit RGB" in out
    kept = stored_flags(tmp_path / "checkpoint.pth")
    assert kept == stored_flags(four_student)  # auto: as the pretrained weights
    capsys.readouterr()
    ranges = as_flags(in_chans=4, image_range="auto", mean_std="auto", eval=True)
    run_class_finetuning.main([*flags, *ranges, *as_flags(resume=tmp_path / "checkpoint.pth")])
    out = capsys.readouterr().out
    assert "acc1" in out and "may suffer" not in out
    # alone with the checkpoint, as it was trained
    answers = as_flags(predict=four / "a", resume=tmp_path / "checkpoint.pth", output_dir=tmp_path / "new")
    run_class_finetuning.main([*answers, *as_flags(device="cpu", num_workers=0)])
    assert len((tmp_path / "new" / "predictions.csv").read_text().splitlines()) == 1 + 8
    flags = finetuning_flags(four, "", *as_flags(finetune=four_student))
    assert "give --in_chans 4" in refused(run_class_finetuning.main, flags, capsys)


@pytest.mark.parametrize("mode", ["--knn", "--cached_features"])
def test_a_probe_reads_images_as_its_backbone_did(mode, four, four_student, tmp_path, capsys):
    flags = as_flags(finetune=four_student, data_set="image_folder", data_path=four, eval_data_path=four)
    more = ["--knn_k", "1"] if mode == "--knn" else as_flags(epochs=1, image_freq=0)
    fixed = as_flags(device="cpu", amp_dtype="fp32", num_workers=0, batch_size=4, output_dir=tmp_path)
    run_linear_eval.main([*flags, *more, *fixed, mode])
    out = capsys.readouterr().out
    assert "pixels     4 channels, range 0 to 4095" in out
    if mode == "--knn":  # each image finds itself
        assert json.loads((tmp_path / "knn.json").read_text())["knn1_acc1"] == 100


def test_segmentation_of_four_channels(four_student, tmp_path, capsys):
    pairs = four_channel_pairs(tmp_path / "pairs")
    more = [*FOUR, *PICTURES, *as_flags(finetune=four_student, mean_std="auto")]
    flags = [flag if flag != "3" else "2" for flag in segmentation_flags(pairs, tmp_path / "out")]
    flags[flags.index("--steps_per_epoch") + 1] = "3"
    run_segmentation_finetuning.main([*flags, *more])
    assert (
        stored_flags(tmp_path / "out" / "checkpoint.pth")["mean_std"]
        == stored_flags(four_student)["mean_std"]
    )
    run_segmentation_finetuning.main(
        as_flags(
            predict=pairs / "images" / "validation",
            resume=tmp_path / "out" / "checkpoint.pth",
            output_dir=tmp_path / "labels",
            device="cpu",
        )
    )
    assert "as trained" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "labels" / "predictions").glob("*_labels.png"))
    assert names == ["0_labels.png", "1_labels.png", "2_labels.png"]
    assert Image.open(tmp_path / "labels" / "predictions" / "0_overlay.png").size == (56, 40)


def test_codes_and_pictures_of_four_channels(four, four_tokenizer, four_student, tmp_path, capsys):
    codes = tmp_path / "codes"
    fixed = as_flags(device="cpu", num_workers=0)
    flags = as_flags(tokenizer_weight=four_tokenizer, data_path=four, output_dir=codes, maps=2)
    encode_images.main([*flags, *fixed])
    assert np.load(codes / "codes.npy").shape == (16, 4)
    about = json.loads((codes / "about.json").read_text())
    assert (about["in_chans"], about["image_range"]) == (4, [0, 4095])
    visualize_codebook.main(as_flags(encoded=codes, output=tmp_path / "page.html"))
    picture = tmp_path / "attention.png"
    visualize_attention.main(
        as_flags(checkpoint=four_student, image=four / "a", count=2, output=picture, device="cpu")
    )
    assert picture.exists() and (tmp_path / "page.html").exists()


def test_pixels_of_four_channels_are_drawn_from_codes(four, four_tokenizer, tmp_path, capsys):
    flags = as_flags(data_path=four, output_dir=tmp_path / "out", train_pixel_decoder=True, epochs=1)
    fixed = as_flags(input_size=32, device="cpu", amp_dtype="fp32", num_workers=0, batch_size=4)
    flags += as_flags(tokenizer_weight=four_tokenizer, pixel_decoder_dim=32)
    message = refused(run_vqkd_training.main, [*flags, *fixed, "--in_chans", "4"], capsys)
    assert "give --in_chans 4 --image_range 0 4095" in message
    run_vqkd_training.main([*flags, *fixed, *FOUR, *PICTURES])
    saved, picture = tmp_path / "out" / "checkpoint.pth", tmp_path / "drawn.png"
    assert checkpoint(saved)["model"]["decoder.to_pixels.bias"].shape == (4,)
    visualize_reconstruction.main(as_flags(checkpoint=saved, image=four / "a", output=picture, device="cpu"))
    assert picture.exists()


def test_features_of_four_channels_are_those_of_the_network(four, four_student, tmp_path):
    out = tmp_path / "features.npy"
    flags = as_flags(output=out, pool="cls", device="cpu", num_workers=0, crop_pct=1)
    extract_features.main([str(four_student), str(four / "a"), *flags])
    network, own = open_backbone(str(four_student))
    view = eval_view(32, 1.0, "bicubic", *normalization_of(own), pixels=PixelFormat.of_flags(own))
    image = view(view.load(str(four / "a" / "0.npy")))["image"]
    with torch.no_grad():
        expected = network.get_intermediate_layers(image[None])[-1][0, 0]
    features = np.load(out)
    assert features.shape == (8, 128)
    assert np.allclose(features[0], expected, atol=1e-5)


# ── weights of other channels ──


def test_rgb_weights_go_to_four_channels_as_timm_does_it(tmp_path):
    name = "beit_base_patch16_224"
    options = {"img_size": 32, "embed_dim": 64, "num_heads": 2, "depth": 1, "num_classes": 0}
    torch.save(timm.create_model(name, **options).state_dict(), tmp_path / "rgb.pth")
    theirs = timm.create_model(
        name,
        **options,
        in_chans=4,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "rgb.pth")},
    )
    ours, _ = open_backbone(str(tmp_path / "rgb.pth"), num_heads=2, in_chans=4)
    x = torch.rand(2, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours.patch_embed.proj.weight, theirs.patch_embed.proj.weight)
        assert torch.allclose(ours.forward_features(x), theirs.eval()(x), atol=1e-5)


def test_export_to_timm_keeps_channels_and_statistics(four, four_student, tmp_path):
    export_checkpoint.main(as_flags(checkpoint=four_student, to="timm", output=tmp_path / "timm"))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    statistics = stored_flags(four_student)["mean_std"]
    assert theirs.pretrained_cfg["input_size"] == (4, 32, 32)
    assert [*theirs.pretrained_cfg["mean"], *theirs.pretrained_cfg["std"]] == pytest.approx(statistics)
    ours, _ = open_backbone(str(four_student))
    x = torch.rand(2, 4, 32, 32)
    with torch.no_grad():
        own = ours.get_intermediate_layers(x)[-1]
        other = theirs.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True)[-1]
    tokens = other[0].flatten(2).transpose(1, 2)
    assert torch.allclose(own[:, 1:], tokens, atol=1e-5)
    # and back
    again, flags = open_backbone(str(tmp_path / "timm"))
    assert again.patch_embed.proj.in_channels == 4
    assert flags["mean_std"] == pytest.approx(statistics)


@pytest.mark.slow  # quicker, of one command each: tests/test_own_pixels.py
@pytest.mark.parametrize("images", ["data", "gray", "four"])
def test_an_exported_classifier_sees_images_as_it_did(images, request, tmp_path, capsys):
    """Range and statistics go to every library and come back: without them it would see
    other pixels, and nothing would say so.
    """
    folder = request.getfixturevalue(images)
    pixels = {"data": [], "gray": GRAY, "four": FOUR}[images]
    run_class_finetuning.main(finetuning_flags(folder, tmp_path, *pixels, *as_flags(mean_std="auto")))
    sources = {"ours": tmp_path / "checkpoint.pth"}
    for library, name in (("timm", "t"), ("huggingface", "h"), ("safetensors", "s.pth"), ("onnx", "o.onnx")):
        sources[library] = tmp_path / name
        flags = as_flags(checkpoint=sources["ours"], to=library, output=sources[library])
        capsys.readouterr()
        export_checkpoint.main(flags)
        said = capsys.readouterr().out
        assert ("becomes 0 to 1 before that" in said) is (images != "data")
    facts = onnxruntime.InferenceSession(sources.pop("onnx")).get_modelmeta().custom_metadata_map
    kept = stored_flags(sources["ours"])
    assert json.loads(facts.get("image_range", "null")) == kept["image_range"]
    x = [hubconf.classifier(str(sources[name])) for name in ("ours", "timm")]
    x += [hubconf.backbone(str(sources["huggingface"]))]
    photo = next(path for path in sorted(folder.rglob("*.*")))
    seen = [network.view(network.view.load(str(photo)))["image"] for network in x]
    assert all((image - seen[0]).abs().max() < 1e-5 for image in seen)
    where = as_flags(eval=True, data_set="image_folder", eval_data_path=folder)
    for library, source in sources.items():
        out = as_flags(finetune=source, output_dir=tmp_path / library, device="cpu", num_workers=0)
        run_class_finetuning.main([*where, *out, "--amp_dtype", "fp32"])
        loss = json.loads((tmp_path / library / "eval.json").read_text())["test_loss"]
        expected = json.loads((tmp_path / "ours" / "eval.json").read_text())["test_loss"]
        assert loss == pytest.approx(expected, rel=1e-4), library


def test_16_bit_colors_keep_their_depth(tmp_path):
    rng = np.random.RandomState(0)
    for index in range(4):
        write_png_16(tmp_path / f"{index}.png", rng.randint(0, 2**16, (40, 40, 3)).astype(np.uint16))
    flags = vqkd_flags(tmp_path, "", "--image_range", "0", "65535", *as_flags(epochs=1))
    dataset = run_vqkd_training.build_dataset(run_vqkd_training.parse_flags(flags))
    assert len(dataset[0]["image"].unique()) > 2900  # of 3 * 32 * 32


# ── runs that start from them ──


def patches_of(model, images):
    with torch.no_grad():
        return model.forward_features(images, return_patch_tokens=True)


def test_continued_pretraining_reads_images_as_its_source_did(
    four, four_tokenizer, four_student, tmp_path, capsys
):
    start = as_flags(init_from=four_student)
    flags = pretraining_flags(four, tmp_path, four_tokenizer, *start, *as_flags(epochs=1))
    trainer = run_beitv2_pretraining.build(run_beitv2_pretraining.parse_flags(flags))
    taken = f"; --in_chans, --image_range, --mean_std of --init_from {four_student}"
    out = capsys.readouterr().out
    assert (
        out.count(taken) == 1 and "pixels     4 channels, range 0 to 4095" in out and "was trained" not in out
    )
    theirs = stored_flags(four_student)
    assert {name: trainer.run.flags[name] for name in theirs} == theirs
    # at step 0 it sees what its source would, and computes the same
    source, own = open_backbone(str(four_student))
    view = eval_view(32, 1.0, "bicubic", *normalization_of(own), pixels=PixelFormat.of_flags(own))
    images = torch.stack([view(view.load(str(path)))["image"] for path in sorted((four / "a").iterdir())])
    assert trainer.stage.mean_std == normalization_of(own)
    assert trainer.data.loader.dataset.view.pixels == view.pixels
    tokens = trainer.state.model.eval()(images, return_patch_tokens=True)[0]
    assert torch.allclose(tokens, patches_of(source, images), atol=1e-6)
    # and goes on so from what it wrote
    trainer.fit()
    assert stored_flags(tmp_path / "checkpoint.pth") == theirs
    capsys.readouterr()
    run_beitv2_pretraining.main(as_flags(config=tmp_path / "flags.json", epochs=2))
    out = capsys.readouterr().out
    assert "resumed" in out and "changed    --epochs" in out and out.count("changed ") == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            "--image_range 0 65535",
            "was trained with --image_range 0 4095, this run has --image_range 0 65535",
        ),
        ("--mean_std half", "was trained on images of mean (0."),
        ("--image_range auto", "range 0 to 4095 (of --init_from"),
        ("--in_chans 3", "give --in_chans 4"),
    ],
)
def test_what_contradicts_the_source_is_named(more, says, four, four_student, capsys):
    flags = pretraining_flags(four, "", four, *as_flags(init_from=four_student, target="pixels"))
    flags = [*flags, *more.split()]
    if "--in_chans" in more:
        assert says in refused(run_beitv2_pretraining.main, flags, capsys)
    else:
        run_beitv2_pretraining.build(run_beitv2_pretraining.parse_flags(flags))
        assert says in capsys.readouterr().out


def test_an_encoder_reads_images_as_its_source_did(gray, gray_tokenizer, tmp_path, capsys):
    flags = vqkd_flags(gray, tmp_path, *as_flags(init_from=gray_tokenizer, epochs=1))
    trainer = run_vqkd_training.build(run_vqkd_training.parse_flags(flags))
    source, _ = modeling_vqkd.open_tokenizer(str(gray_tokenizer))
    model = trainer.state.model.eval()
    images = torch.rand(2, 1, 32, 32)
    before, now = (network.pre_process(images) for network in (source, model))
    assert torch.equal(before, now) and trainer.data.loader.dataset.view.pixels == source.pixels
    assert torch.allclose(patches_of(model.encoder, now), patches_of(source.encoder, now), atol=1e-6)
    # an evaluation looks as its training did
    capsys.readouterr()
    evaluation = as_flags(eval=True, resume=gray_tokenizer, eval_data_path=gray)
    run_vqkd_training.main(vqkd_flags(gray, "", *evaluation))
    alone = capsys.readouterr().out.splitlines()[-1]
    run_vqkd_training.main(vqkd_flags(gray, "", *evaluation, *GRAY))
    assert "rec_loss" in alone and capsys.readouterr().out.splitlines()[-1] == alone


READERS = {
    "pretraining": lambda d, t, s, out: (
        run_beitv2_pretraining,
        pretraining_flags(d, out, t, *GRAY, *as_flags(init_from=s)),
    ),
    "tokenizer": lambda d, t, s, out: (run_vqkd_training, vqkd_flags(d, out, *GRAY, *as_flags(init_from=t))),
    "fine-tuning": lambda d, t, s, out: (
        run_class_finetuning,
        finetuning_flags(d, out, *GRAY, *as_flags(finetune=s)),
    ),
    "pixel decoder": lambda d, t, s, out: (
        run_vqkd_training,
        [
            *as_flags(data_path=d, output_dir=out, train_pixel_decoder=True, tokenizer_weight=t, epochs=2),
            *as_flags(in_chans=1, image_range="auto", input_size=32, device="cpu", num_workers=0),
            *as_flags(pixel_decoder_dim=32, batch_size=4),
        ],
    ),
    "evaluation": lambda d, t, s, out: (
        run_vqkd_training,
        vqkd_flags(d, "", *as_flags(eval=True, resume=t, eval_data_path=d)),
    ),
    "codes": lambda d, t, s, out: (
        encode_images,
        as_flags(tokenizer_weight=t, data_path=d, output_dir=out, device="cpu", num_workers=0),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_no_file_of_weights_is_read_twice(name, gray, gray_tokenizer, tmp_path, monkeypatch):
    """Also where a run resumes and its flags ask for `auto`."""
    weights = student(tmp_path / "pt.pth", in_chans=1, image_range=[0.0, 4095.0], mean_std=[0.5, 0.2])
    entry, flags = READERS[name](gray, gray_tokenizer, weights, tmp_path / "out")
    original, read = weight_files.load_file, []
    monkeypatch.setattr(weight_files, "load_file", lambda path: read.append(str(path)) or original(path))
    for _ in range(2):
        read.clear()
        entry.main(flags)
        assert read and len(read) == len(set(read)), read


# ── refusals ──


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--image_range 4095 0", "--image_range 4095 0: give two numbers, black and then white"),
        ("--image_range 7", "--image_range 7: give two numbers"),
        ("--image_range white", "'white' is neither a number nor auto"),
        ("--mean_std half 0.5", "--mean_std half 0.5: give one word, or numbers"),
        ("--mean_std 0.5 0.5", "--in_chans 3 needs 6 numbers"),
        ("--mean_std 0.5 0.5 0.5 1 0 1", "standard deviations above 0"),
        ("--mean_std auto --imagenet_default_mean_and_std", "both say how images are normalized"),
        ("--in_chans 4 --imagenet_default_mean_and_std", "ImageNet's mean and std are of 3 channels"),
        ("--in_chans 4 --mean_std imagenet", "ImageNet's mean and std are of 3 channels"),
        ("--in_chans 4 --teacher_channels 0 1 4", "--teacher_channels 4: --in_chans 4 are channels 0 to 3"),
        (
            "--in_chans 4 --teacher_channels 0 1 2 --data_pipeline fast",
            "--data_pipeline fast is a way for 8-bit RGB",
        ),
        ("--in_chans 4 --tokenizer_model dall-e", "dall-e reads RGB, of --in_chans 4"),
        ("--in_chans 2", "no image of a sample of 16 could be read"),
    ],
)
def test_flags_of_pixels_are_checked(flags, message, four, tokenizer_weight, capsys):
    given = pretraining_flags(four, "", tokenizer_weight)
    if "dall-e" in flags:
        start = given.index("--second_input_size")
        given = given[:start] + given[start + 2 :]
    assert message in refused(run_beitv2_pretraining.main, [*given, *flags.split()], capsys)


def test_a_model_without_flags_of_pixels_is_as_ever():
    model = modeling_finetune.create_model("beit_demo_patch16_128", img_size=32)
    assert model.patch_embed.proj.in_channels == 3
