"""The pixel decoder: it learns to draw from codes alone, the tokenizer stays as it was,
and its file needs no other.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from tiny_runs import (
    SIZE,
    TOKENIZER,
    as_flags,
    assert_same_weights,
    checkpoint,
    kill_after,
    log_lines,
    vqkd_flags,
)

import arguments
import encode_images
import modeling_vqkd
import run_vqkd_training
import visualize_attention
import visualize_reconstruction
from runtime import metrics
from visualization import drawing, pixel_decoder
from visualization.drawing import CAPTION
from visualization.pixel_decoder import Reconstructor


def flags(data: Path, codes: Path, out: Path, *more: str) -> list[str]:
    own = as_flags(train_pixel_decoder=True, tokenizer_weight=codes, data_path=data, output_dir=out)
    small = as_flags(pixel_decoder_depth=1, pixel_decoder_dim=64, batch_size=4, epochs=2)
    return [*own, *small, *SIZE, *more]


def four_photos(folder: Path) -> Path:
    """Half dark, half light, the border in four directions: images that four tokens can
    tell apart.
    """
    folder.mkdir()
    for number in range(4):
        image = torch.full((32, 32, 3), 40, dtype=torch.uint8)
        (image if number % 2 else image.transpose(0, 1))[:, 16 * (number // 2) :][:, :16] = 200
        Image.fromarray(image.numpy()).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
def test_it_draws_what_the_codes_tell_and_beats_the_mean_color(tokenizer_weight, tmp_path):
    images, out = four_photos(tmp_path / "images"), tmp_path / "out"
    longer = ["--epochs", "150", "--lr", "0.1", "--eval_freq", "150", "--print_freq", "1000"]  # times 4 / 128
    run_vqkd_training.main(
        [
            *flags(images, tokenizer_weight, out, *longer),
            "--min_crop_scale",
            "1",
            "--eval_data_path",
            str(images),
        ]
    )
    first, last = log_lines(out)[0], log_lines(out)[-1]
    # half the range is 160 / 255: -20 log10(80 / 255)
    assert last["test_psnr_mean_color"] == pytest.approx(10.07, abs=0.01)
    assert last["test_psnr"] > last["test_psnr_mean_color"] + 6
    assert last["train_psnr"] > first["train_psnr"] + 6
    assert (out / "checkpoint-best.pth").exists()


def test_the_tokenizer_stays_as_it_was(data, tokenizer_weight, tmp_path):
    run_vqkd_training.main(flags(data, tokenizer_weight, tmp_path, "--weight_decay", "0.1"))
    saved, before = checkpoint(tmp_path / "checkpoint.pth"), checkpoint(tokenizer_weight)["model"]
    assert before.keys() <= {key.removeprefix("tokenizer.") for key in saved["model"]}
    assert all(torch.equal(value, saved["model"][f"tokenizer.{key}"]) for key, value in before.items())
    trained = sum(len(group["params"]) for group in saved["optimizer"]["param_groups"])
    assert trained == sum(1 for _ in pixel_decoder.PixelDecoder((2, 2), 8, 1, 64).parameters())


def test_training_leaves_the_tokenizer_in_eval_mode_and_frozen():
    model = Reconstructor(
        modeling_vqkd.create_model(TOKENIZER, img_size=32, n_code=16, code_dim=8), 1, 32
    ).train()
    assert model.decoder.training
    assert not any(module.training for module in model.tokenizer.modules())
    model(torch.rand(2, 3, 32, 32)).mean().backward()
    assert not any(p.requires_grad for p in model.tokenizer.parameters())
    assert all(p.grad is None for p in model.tokenizer.parameters())
    assert all(p.grad is not None for name, p in model.decoder.named_parameters())


def test_pixels_come_from_the_codes_alone():
    torch.manual_seed(0)
    model = Reconstructor(
        modeling_vqkd.create_model(TOKENIZER, img_size=32, n_code=16, code_dim=8, as_tokenizer=True), 1, 32
    )
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        drawn = model.eval()(images)
    assert drawn.shape == images.shape
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1
    assert torch.equal(drawn, model.decode(model.encode(images)))
    other = (model.encode(images) + 1) % 16
    assert not torch.equal(drawn, model.decode(other))


def test_resumption_is_exact(data, tokenizer_weight, tmp_path, monkeypatch):
    run_vqkd_training.main(flags(data, tokenizer_weight, tmp_path / "whole"))
    broken = flags(data, tokenizer_weight, tmp_path / "broken", "--save_ckpt_steps", "2")
    kill_after(6, monkeypatch)  # of 4 per epoch
    with pytest.raises(KeyboardInterrupt):
        run_vqkd_training.main(broken)
    monkeypatch.undo()
    run_vqkd_training.main(broken)
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "broken/checkpoint.pth")
    losses = [[line["train_loss"] for line in log_lines(tmp_path / name)] for name in ("whole", "broken")]
    assert losses[0] == losses[1]


def test_the_checkpoint_alone_is_enough(data, tmp_path, capsys):
    """Also where the tokenizer scales images in another way: that is in no tokenizer's
    weights.
    """
    tokenizer_file = tmp_path / "vqkd/checkpoint.pth"
    run_vqkd_training.main(vqkd_flags(data, tmp_path / "vqkd", "--process_type", "imagenet_norm"))
    run_vqkd_training.main(flags(data, tokenizer_file, tmp_path / "pixels", "--image_freq", "1"))
    images = torch.rand(2, 3, 32, 32)
    expected = modeling_vqkd.open_tokenizer(str(tokenizer_file))[0].get_codebook_indices(images)
    shutil.rmtree(tmp_path / "vqkd")
    saved = tmp_path / "pixels/checkpoint.pth"
    model = pixel_decoder.open_reconstructor(str(saved), "--checkpoint")
    assert torch.equal(model.encode(images).flatten(1), expected)
    assert model.tokenizer.input_mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert [path.name for path in (tmp_path / "pixels/pictures").iterdir()]

    capsys.readouterr()
    picture = tmp_path / "new/folder/reconstruction.png"
    files = [str(data / "a/0.jpg"), str(data / "b")]
    visualize_reconstruction.main(
        ["--checkpoint", str(saved), "--image", *files, "--count", "9", "--output", str(picture)]
    )
    lines = capsys.readouterr().out
    assert (
        len(re.findall(r"^ *\d+\.\d\d dB \(mean color \d+\.\d\d\) .*\.jpg$", lines, flags=re.MULTILINE)) == 9
    )
    # 8 images and 1: two bands of three rows
    assert Image.open(picture).size == (8 * 162 - 2, 6 * (160 + CAPTION + 2) - 2)


@pytest.fixture(scope="module")
def pixels(data, tokenizer_weight, tmp_path_factory):
    out = tmp_path_factory.mktemp("pixels")
    run_vqkd_training.main(flags(data, tokenizer_weight, out, "--epochs", "1"))
    return out / "checkpoint.pth"


def drawn_of(pixels, images, out, monkeypatch, *more):
    """(codes, captions) of a call of visualize_reconstruction.py."""
    seen, draw = [], drawing.draw_reconstructions

    def spy(images, codes, n_codes, drawn, captions):
        seen.extend((codes.flatten(1).tolist(), captions))
        return draw(images, codes, n_codes, drawn, captions)

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "draw_reconstructions", spy)
        visualize_reconstruction.main(
            ["--checkpoint", str(pixels), "--image", str(images), "--output", str(out), *more]
        )
    return seen


@pytest.mark.parametrize("view", [[], ["--crop_pct", "0.5"]])
def test_an_image_has_the_same_tokens_in_every_script(
    view, data, tokenizer_weight, pixels, tmp_path, monkeypatch
):
    own = [
        *as_flags(tokenizer_weight=tokenizer_weight, data_path=data, output_dir=tmp_path / "codes"),
    ]
    encode_images.main([*own, "--num_workers", "0", "--device", "cpu", *view])
    shown, captions = drawn_of(
        pixels, data, tmp_path / "x.png", monkeypatch, "--count", "99", "--device", "cpu", *view
    )
    assert shown == np.load(tmp_path / "codes/codes.npy").tolist()
    names = [Path(line).name for line in (tmp_path / "codes/files.txt").read_text().splitlines()]
    assert [caption[0] for caption in captions] == names
    assert all(re.fullmatch(r"drawn: \d+\.\d\d dB", caption[2]) for caption in captions)


def test_the_scripts_that_look_share_flags_and_defaults():
    scripts = (encode_images, visualize_attention, visualize_reconstruction)
    shared = [
        {name: script.get_parser().get_default(name) for name in ("crop_pct", "device")} for script in scripts
    ]
    assert shared == [{"crop_pct": None, "device": "cuda"}] * 3
    assert [script.get_parser().get_default("count") for script in scripts[1:]] == [8, 8]


def test_a_broken_image_of_a_folder_is_left_out(data, pixels, tmp_path, capsys):
    folder = shutil.copytree(data / "a", tmp_path / "images")
    (folder / "1.jpg").write_bytes(b"no image")
    (folder / "2.jpg").write_bytes((folder / "3.jpg").read_bytes()[:200])
    given = ["--checkpoint", str(pixels), "--output", str(tmp_path / "x.png"), "--image"]
    visualize_reconstruction.main([*given, str(folder)])
    lines = capsys.readouterr().out
    assert lines.count("left out") == 2 and lines.count(" dB ") == len(list(folder.iterdir())) - 2 + 1
    for source, message in (
        (folder / "2.jpg", r"--image .*2\.jpg: cannot be read"),
        ("/nowhere", "--image /nowhere: no such"),
    ):
        assert re.search(message, refused(visualize_reconstruction.main, [*given, str(source)], capsys))


@pytest.mark.parametrize(
    ("name", "message"),
    [(".", r"--output .*: is a folder"), ("x.xyz", r"--output .*x\.xyz: the name must end in \.png")],
)
def test_the_name_of_the_picture_is_looked_at_before_the_model(
    name, message, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(visualize_reconstruction, "open_reconstructor", None)
    own = ["--checkpoint", "x.pth", "--image", str(data), "--output", str(tmp_path / name)]
    assert re.search(message, refused(visualize_reconstruction.main, own, capsys))


def test_psnr():
    black = torch.zeros(3, 3, 4, 4)
    off = torch.tensor([0.1, 1.0, 0.0]).view(3, 1, 1, 1).expand_as(black)
    assert metrics.psnr(off, black).tolist() == pytest.approx([20.0, 0.0, 100.0], abs=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tokenizer_weight", ""], "--train_pixel_decoder needs a trained tokenizer: --tokenizer_weight"),
        (["--input_size", "64"], r"--input_size 64: .* images of 32 pixels: --input_size 32"),
        (["--pixel_decoder_dim", "40"], "--pixel_decoder_dim 40: give a multiple of 32"),
        (["--teacher_model_type", "clip"], "--teacher_model_type has no effect with --train_pixel_decoder"),
        (["--codebook_n_emd", "16"], "--codebook_n_emd has no effect with"),
        (["--eval"], "--eval has no effect with"),
        (["--tokenizer_weight", "/nowhere.pth"], "/nowhere.pth"),
    ],
)
def test_mistakes_end_in_one_sentence(more, message, data, tokenizer_weight, tmp_path, capsys):
    assert re.search(
        message, refused(run_vqkd_training.main, flags(data, tokenizer_weight, tmp_path, *more), capsys)
    )


def test_its_flags_are_refused_where_they_do_nothing(data, tokenizer_weight, tmp_path, capsys):
    flag = ["--tokenizer_weight", str(tokenizer_weight)]
    assert re.search(
        "no effect without --train_pixel_decoder",
        refused(run_vqkd_training.main, vqkd_flags(data, tmp_path, *flag), capsys),
    )


def test_another_tokenizer_than_the_resumed_one_is_refused(data, tokenizer_weight, tmp_path, capsys):
    other = checkpoint(tokenizer_weight)
    other["model"]["quantize.embedding.weight"] = other["model"]["quantize.embedding.weight"].flip(0)
    torch.save(other, tmp_path / "other.pth")
    run_vqkd_training.main(flags(data, tokenizer_weight, tmp_path / "out", "--epochs", "1"))
    again = flags(data, tmp_path / "other.pth", tmp_path / "out")
    assert re.search(
        "is not the tokenizer that the checkpoint", refused(run_vqkd_training.main, again, capsys)
    )


def test_a_tokenizer_is_no_pixel_decoder(data, tokenizer_weight, capsys):
    arguments_ = ["--checkpoint", str(tokenizer_weight), "--image", str(data)]
    assert re.search(
        "holds no pixel decoder: run_vqkd_training.py",
        refused(visualize_reconstruction.main, arguments_, capsys),
    )


def test_the_mode_has_its_own_defaults_and_keeps_what_is_given():
    mode = ["--train_pixel_decoder", "--tokenizer_weight", "t.pth"]
    args = run_vqkd_training.parse_flags([*mode, "--data_path", "x", "--epochs", "3"])
    assert (args.lr, args.epochs) == (2e-3, 3)
    args = run_vqkd_training.parse_flags(["--data_path", "x"])
    assert (args.lr, args.epochs) == (5e-5, 100)
    assert arguments.changed_flags(run_vqkd_training.get_parser(), args) == {"data_path": "x"}
