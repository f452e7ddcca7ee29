"""Each switch of pretraining, as main([...]) on tiny data: it does what it says, or is
refused, and its run resumes.
"""

import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from many_processes import two_processes
from refusals import refused
from tiny_runs import (
    SIZE,
    STUDENT,
    as_flags,
    assert_same_weights,
    checkpoint,
    finetuning_flags,
    kill_after,
    log_lines,
    pretraining_flags,
    vqkd_flags,
)

import arguments
import engine_for_pretraining
import masking_generator
import modeling_dvae
import modeling_pretrain
import modeling_vqkd
import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
import visualize_attention
from checkpoint_io import tokenizer_weights
from engine_for_pretraining import PretrainingStage
from errors import UserError
from flags.pretraining import build_mask_generator
from masking_generator import RandomMaskingGenerator

NOWHERE = ["--data_path", "/nowhere"]
PLAIN = ["--model", "beit_demo_patch16_128_8k_vocab"]  # without the CLS head
BOTH = pytest.mark.parametrize("head", [[], PLAIN], ids=["cls head", "plain"])


@pytest.fixture(scope="module")
def dvae(tmp_path_factory):
    """DALL-E's encoder, tiny, 16 codes, as a state dict."""
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("dvae") / "encoder.pth"
    torch.save(modeling_dvae.DallEEncoder(n_hid=8, n_blk_per_group=1, vocab_size=16).state_dict(), path)
    return path


def pretrain(data, out, codes, *more):
    run_beitv2_pretraining.main(pretraining_flags(data, out, codes, *more))
    return log_lines(out)


def pixel_flags(data, out, *more):
    """pretraining_flags without the tokenizer's: 2 of 2 x 2 patches are masked."""
    flags = ["--data_path", str(data), "--output_dir", str(out), "--target", "pixels", "--model", STUDENT]
    flags += ["--early_layers", "4", "--head_layers", "1", "--batch_size", "4", "--lr", "1e-3", *SIZE]
    return [*flags, "--num_mask_patches", "2", "--epochs", "2", "--warmup_epochs", "1", *more]


def spy_on_steps(monkeypatch):
    """What the stage's steps saw and gave: [(stage, batch, outputs of the model, loss, logs)], detached."""
    original, seen = PretrainingStage.step, []

    def spied(self, model, batch):
        with torch.random.fork_rng():  # the logits of the step to come, with the same dropped paths
            outputs = model(batch["image"], batch["mask"], return_all_tokens=self.predict_all)
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        loss, logs = original(self, model, batch)
        seen.append((self, batch, [r.detach().clone() for r in results], loss.detach(), logs))
        return loss, logs

    monkeypatch.setattr(PretrainingStage, "step", spied)
    return seen


# ── masks ──
def test_random_masks_are_uniform_and_exact():
    random.seed(0)
    generator = RandomMaskingGenerator((4, 6), 5)
    masks = np.stack([generator() for _ in range(6000)])
    assert masks.shape == (6000, 4, 6) and masks.dtype.kind == "i"
    assert (masks.sum(axis=(1, 2)) == 5).all()
    assert np.abs(masks.mean(axis=0) - 5 / 24).max() < 0.025  # 4.7 standard deviations
    pairs = (masks[:, :, 1:] & masks[:, :, :-1]).sum(axis=(1, 2)).mean()
    # neighbors are masked independently: no blocks
    assert pairs == pytest.approx(20 * 5 / 24 * 4 / 23, abs=0.05)
    assert RandomMaskingGenerator(3, 0)().sum() == 0
    with pytest.raises(ValueError, match="10 patches cannot be masked on a 3x3 grid"):
        RandomMaskingGenerator(3, 10)


def test_mask_type_random_masks_single_patches(data, codes, tmp_path, monkeypatch):
    seen = spy_on_steps(monkeypatch)
    monkeypatch.setattr(
        masking_generator.MaskingGenerator, "_mask_block", lambda *_: pytest.fail("a block was masked")
    )
    lines = pretrain(data, tmp_path, codes, "--mask_type", "random", "--epochs", "1")
    masks = torch.cat([batch["mask"] for _, batch, *_ in seen])
    assert masks.sum(dim=1).tolist() == [2] * 16
    assert len({tuple(mask.tolist()) for mask in masks}) > 3
    assert "train_mlm_acc_1" in lines[0]


def test_masks_follow_the_flags():
    def masked(*flags):
        args = arguments.parse(run_beitv2_pretraining.get_parser(), ["--data_path", "x", *flags])
        return int(build_mask_generator(args, 14)().sum())

    assert [masked(), masked("--mask_type", "random"), masked("--no_mask")] == [75, 75, 0]
    assert masked("--mask_type", "random", "--num_mask_patches", "98") == 98


# ── what is predicted ──
@BOTH
def test_predict_all_covers_all_patches(head, data, codes, tmp_path, monkeypatch):
    seen = spy_on_steps(monkeypatch)
    lines = pretrain(
        data, tmp_path, codes, "--predict", "all", "--epochs", "1", "--eval_data_path", str(data), *head
    )
    stage, batch, outputs, loss, logs = seen[0]
    targets = stage.target.tokenizer.get_codebook_indices(batch["tokenizer_image"])  # (B, N)
    expected = [F.cross_entropy(out.flatten(0, 1), targets.flatten()) for out in outputs]
    assert [out.shape for out in outputs] == [(4, 4, 16)] * (1 if head else 2)
    assert loss == pytest.approx(float(sum(expected)))
    right = outputs[0].argmax(-1) == targets
    ending = "" if head else "_1"
    assert logs[f"all_acc{ending}"] == pytest.approx(float(right.float().mean()))
    assert logs[f"mlm_acc{ending}"] == pytest.approx(float(right[batch["mask"]].float().mean()))
    assert {f"train_all_acc{ending}", f"test_mlm_acc{ending}", f"test_all_acc{ending}"} <= lines[0].keys()
    # four training steps, then those of the evaluation
    counted = sum(step[1]["mask"].numel() for step in seen[:4])
    assert stage.target.code_counts.sum() == counted == 64


def test_only_masked_patches_count_by_default(data, codes, tmp_path, monkeypatch):
    seen = spy_on_steps(monkeypatch)
    lines = pretrain(data, tmp_path, codes, "--epochs", "1")
    stage, batch, outputs, loss, _ = seen[0]
    targets = stage.target.tokenizer.get_codebook_indices(batch["tokenizer_image"])[batch["mask"]]
    assert [out.shape for out in outputs] == [(8, 16)] * 2
    assert loss == pytest.approx(float(sum(F.cross_entropy(out, targets) for out in outputs)))
    assert not any("all_acc" in key for key in lines[0])


def test_no_mask_shows_everything_and_predicts_everything(data, codes, tmp_path, monkeypatch, capsys):
    seen = spy_on_steps(monkeypatch)
    lines = pretrain(
        data, tmp_path, codes, "--no_mask", "--num_mask_patches", "0", *PLAIN, "--eval_data_path", str(data)
    )
    _, batch, outputs, _, _ = seen[0]
    assert not batch["mask"].any()
    assert outputs[0].shape == (4, 4, 16)
    assert "train_all_acc" in lines[0] and "test_all_acc" in lines[0]
    assert not any("mlm_acc" in key for key in lines[0])
    assert all(np.isfinite(value) for value in lines[1].values())
    assert "target     tokens of all patches, none of them masked" in capsys.readouterr().out


@BOTH
def test_pixels_are_regressed_without_a_tokenizer(head, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        run_beitv2_pretraining, "build_tokenizer", lambda *_: pytest.fail("a tokenizer was opened")
    )
    seen = spy_on_steps(monkeypatch)
    run_beitv2_pretraining.main(
        pixel_flags(data, tmp_path, "--epochs", "1", "--eval_data_path", str(data), *head)
    )
    _, batch, outputs, loss, _ = seen[0]
    assert "tokenizer_image" not in batch
    patches = []  # by hand: image by image, row by row, each patch flattened as (channel, row, column)
    for image, mask in zip(batch["image"], batch["mask"].view(-1, 2, 2), strict=True):
        for y, x in mask.nonzero().tolist():
            patches.append(image[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].flatten())
    target = torch.stack(patches)
    assert target.shape == (8, 768) == outputs[0].shape
    assert loss == pytest.approx(float(sum((out - target).square().mean() for out in outputs)))
    line = log_lines(tmp_path)[0]
    branches = set() if head else {"train_loss_1", "train_loss_2"}
    assert {"train_loss", "test_loss"} | branches <= line.keys()
    assert not any("acc" in key or "code" in key for key in line)
    weights = checkpoint(tmp_path / "checkpoint.pth")["model"]
    assert weights["lm_head.weight"].shape == (768, 128)
    reason = "nothing here: beit_demo_patch16_128_8k_vocab has no CLS head"
    assert (reason in capsys.readouterr().out) == bool(head)


def test_pixels_are_normalized_by_flag_and_predicted_everywhere(data, tmp_path, monkeypatch):
    seen = spy_on_steps(monkeypatch)
    more = [
        *as_flags(imagenet_default_mean_and_std=True, predict="all"),
        *PLAIN,
        *as_flags(image_freq=1, epochs=1),
    ]
    run_beitv2_pretraining.main(pixel_flags(data, tmp_path, *more))
    stage, batch, outputs, loss, logs = seen[0]
    assert outputs[0].shape == (4, 4, 768)
    assert stage.target.encode(batch).shape == (16, 768)
    grid = stage.target.encode(batch).view(4, 2, 2, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(4, 3, 32, 32)
    assert torch.equal(grid, batch["image"])
    assert logs == {}
    assert loss == pytest.approx(
        float((outputs[0].flatten(0, 1) - stage.target.encode(batch)).square().mean())
    )


def test_the_picture_shows_image_mask_and_pasted_prediction(data, tmp_path):
    run_beitv2_pretraining.main(pixel_flags(data, tmp_path, "--image_freq", "1", "--epochs", "1"))
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["masked_pixels-0000.png"]
    mean_std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    target = engine_for_pretraining.Pixels(2, mean_std)
    image = torch.rand(3, 4, 4)
    values = target.encode({"image": (image[None] - 0.5) / 0.5})
    answered = values.clone()
    answered[1] = 0.0  # the upper right patch in mid-gray
    (picture,) = target.pictures(values, answered, (2, 2), (4, 4))
    expected = image.clone()
    expected[:, :2, 2:] = 0.5
    assert torch.allclose(picture, expected, atol=1e-6)


@pytest.mark.parametrize("stop_after", [4, 6])  # of 4 steps an epoch
def test_a_resumed_pixel_run_is_exact(stop_after, data, tmp_path, monkeypatch):
    whole, broken = (pixel_flags(data, tmp_path / name, "--drop_path", "0.1") for name in ("whole", "broken"))
    run_beitv2_pretraining.main(whole)
    kill_after(stop_after, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_beitv2_pretraining.main([*broken, "--save_ckpt_steps", "2"])
    monkeypatch.undo()
    run_beitv2_pretraining.main([*broken, "--save_ckpt_steps", "2"])
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "broken/checkpoint.pth")
    assert [line["train_loss"] for line in log_lines(tmp_path / "whole")] == [
        line["train_loss"] for line in log_lines(tmp_path / "broken")
    ]


def test_a_run_goes_on_with_its_own_task_alone(data, codes, tmp_path, capsys):
    pretrain(data, tmp_path, codes, "--epochs", "1")
    for more, sentence in (
        (
            ["--predict", "all"],
            "trained on the tokens of masked patches, this run is on the tokens of all patches",
        ),
        (["--no_mask", "--num_mask_patches", "0"], "none of them masked: go on with the same --target"),
        (["--target", "pixels"], "of another shape than this run's model"),
    ):
        with pytest.raises(SystemExit):
            pretrain(data, tmp_path, codes, *more)
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one(data, codes, tmp_path):
    """All that is unusual at once: no tokenizer, empty masks (the mask token has no
    gradient), all patches, held-out images.
    """
    flags = [
        *as_flags(target="pixels", no_mask=True, num_mask_patches=0, drop_path=0, eval_data_path=data),
    ]
    two_processes("run_beitv2_pretraining.py", pretraining_flags(data, tmp_path / "two", codes, *flags))
    lines = pretrain(data, tmp_path / "one", codes, *flags, "--batch_size", "8")
    for two, one in zip(log_lines(tmp_path / "two"), lines, strict=True):
        for key in one.keys() - {"seconds"}:
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-3), key


def test_a_pixel_run_is_fine_tuned_and_looked_at(data, tmp_path, capsys):
    run_beitv2_pretraining.main(pixel_flags(data, tmp_path / "pt", "--epochs", "1"))
    weights = tmp_path / "pt/checkpoint.pth"
    run_class_finetuning.main(
        finetuning_flags(data, tmp_path / "ft", "--finetune", str(weights), "--epochs", "1")
    )
    assert re.search("left out   .*lm_head.weight", capsys.readouterr().out)
    picture, photo = tmp_path / "attention.png", next(data.rglob("*.jpg"))
    visualize_attention.main(["--checkpoint", str(weights), "--image", str(photo), "--output", str(picture)])
    assert picture.exists()


# ── positions ──
POSITIONS = {
    "relative": [],
    "absolute": ["--abs_pos_emb", "--disable_rel_pos_bias"],
    "both": ["--abs_pos_emb"],
    "none": ["--disable_rel_pos_bias"],
}
DEFAULT_POSITIONS = {"--abs_pos_emb": "no --abs_pos_emb", "--disable_rel_pos_bias": "--rel_pos_bias"}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions(name, data, tmp_path, capsys):
    run_beitv2_pretraining.main(pixel_flags(data, tmp_path, *POSITIONS[name]))
    weights = checkpoint(tmp_path / "checkpoint.pth")["model"]
    table = "rel_pos_bias.relative_position_bias_table"
    assert ("pos_embed" in weights) == (name in ("absolute", "both"))
    assert (table in weights) == (name in ("relative", "both"))
    if table in weights:
        assert weights[table].abs().max() > 0  # it starts at 0
    lines = log_lines(tmp_path)
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    # fine-tuning with the same flags takes all positions over; with the default ones it
    # says what it leaves out or lacks
    weights_file = str(tmp_path / "checkpoint.pth")
    for flags in (POSITIONS[name], []):
        run_class_finetuning.main(
            finetuning_flags(data, "", "--finetune", weights_file, "--epochs", "1", *flags)
        )
        out = capsys.readouterr().out
        same = flags == POSITIONS[name]
        assert ("was trained with" in out) != same
        assert ("pos_embed" in out) == (not same and "--abs_pos_emb" in POSITIONS[name])
        if not same:
            theirs = ", ".join(POSITIONS[name])
            ours = ", ".join(DEFAULT_POSITIONS[flag] for flag in POSITIONS[name])
            assert f"{weights_file} was trained with {theirs} and is fine-tuned with {ours}: give" in out
    # without positions nothing tells one masked patch of an image from another
    model = modeling_pretrain.create_model(
        PLAIN[1],
        img_size=32,
        vocab_size=768,
        init_values=0.1,
        early_layers=4,
        use_abs_pos_emb="pos_embed" in weights,
        use_shared_rel_pos_bias=table in weights,
    )
    model.load_state_dict({key: value for key, value in weights.items() if "cls_pt" not in key})
    mask = torch.tensor([[True, False, False, True]])
    first, second = model.eval()(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), mask)
    assert torch.allclose(first, second, atol=1e-5) == (name == "none")


# ── DALL-E's tokenizer ──
def dall_e_flags(data, out, dvae, *more):
    """No --second_input_size: 16 pixels for the 2 x 2 grid."""
    codes = as_flags(target="tokens", tokenizer_model="dall-e", tokenizer_weight=dvae, codebook_size=16)
    return [*pixel_flags(data, out, *PLAIN), *codes, *more]


@pytest.mark.parametrize("name", ["dall-e", "dall_e"])
def test_dall_e_end_to_end(name, data, dvae, tmp_path, monkeypatch):
    seen = spy_on_steps(monkeypatch)
    more = [
        "--tokenizer_model",
        name,
        *as_flags(second_interpolation="lanczos", image_freq=1, eval_data_path=data),
    ]
    run_beitv2_pretraining.main(dall_e_flags(data, tmp_path, dvae, *more))
    _, batch, outputs, loss, _ = seen[0]
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["tokenizer_image"].shape == (4, 3, 16, 16)
    encoder = modeling_dvae.load_dall_e_encoder(str(dvae))
    targets = encoder.get_codebook_indices(batch["tokenizer_image"])[batch["mask"]]
    assert loss == pytest.approx(float(F.cross_entropy(outputs[0], targets)))
    lines = log_lines(tmp_path)
    assert {"train_mlm_acc", "train_majority_code_share", "test_mlm_acc"} <= lines[0].keys()
    assert (tmp_path / "pictures/masked_tokens-0000.png").exists()


def test_dall_e_refuses_another_codebook_and_another_grid(data, dvae, tmp_path, capsys):
    for more, sentence in (
        (["--codebook_size", "32"], f"the dVAE in {dvae} has 16 codes, not 32: pass --codebook_size 16"),
        (
            ["--second_input_size", "32"],
            "--second_input_size 32 gives the tokenizer another grid than the model's 2 x 2: use 16",
        ),
        (["--tokenizer_model", "dalle"], "unknown tokenizer 'dalle'; did you mean dall_e or dall-e?"),
    ):
        assert sentence in refused(
            run_beitv2_pretraining.main, dall_e_flags(data, tmp_path, dvae, *more), capsys
        )


@pytest.mark.parametrize(
    ("model", "view"), [("base_patch16_224", 112), ("base_patch16_256", 128), ("huge_patch14_224", 128)]
)
def test_the_views_of_both_tokenizers_follow_the_grid(model, view, capsys):
    size = model.split("_")[-1]
    flags = ["--model", f"beit_{model}_8k_vocab", "--input_size", size, "--second_input_size", "24"]
    assert f"use {view}, or leave it out" in refused(
        run_beitv2_pretraining.main, [*NOWHERE, *flags, "--tokenizer_model", "dall-e"], capsys
    )
    assert f"use {2 * view}, or leave it out" in refused(
        run_beitv2_pretraining.main, [*NOWHERE, *flags], capsys
    )


# ── what is refused, and what is said to do nothing ──
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--no_mask", "--num_mask_patches", "75"],
            "--num_mask_patches 75 and --no_mask contradict each other",
        ),
        (["--no_mask", "--predict", "masked"], "--no_mask leaves nothing for --predict masked"),
        (["--num_mask_patches", "0"], "--num_mask_patches 0: .* or give --no_mask to mask none"),
        (
            ["--head_layers", "0"],
            "--head_layers 0 must be 1 or more: .*--model beit_base_patch16_224_8k_vocab$",
        ),
        (["--head_layers", "-1"], "--head_layers: .-1. is not a whole number"),
        (["--early_layers", "0"], "--early_layers 0 must lie between 1 and"),
        (["--target", "pixel"], "argument --target: invalid choice"),
    ],
)
def test_impossible_combinations_are_refused(flags, message, capsys):
    model = ["--model", "beit_base_patch16_224_8k_vocab_cls_pt"]
    error = refused(run_beitv2_pretraining.main, [*NOWHERE, *model, *flags], capsys)
    assert re.search(message, error.strip(), flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (
            [*PLAIN],
            "--early_layers, --head_layers do nothing here: beit_demo_patch16_128_8k_vocab has no CLS head",
        ),
        (
            [*PLAIN, "--shared_lm_head", "False"],
            "--early_layers, --head_layers, --shared_lm_head do nothing here",
        ),
        (
            ["--target", "pixels"],
            "--codebook_dim, --codebook_size, --second_input_size, "
            "--tokenizer_model, --tokenizer_weight "
            "do nothing here: --target pixels has no tokenizer",
        ),
        (
            ["--mask_type", "random", "--min_mask_patches_per_block", "2"],
            "--min_mask_patches_per_block does nothing here: --mask_type random has no blocks",
        ),
        (
            ["--no_mask", "--num_mask_patches", "0", "--mask_type", "random"],
            "--mask_type does nothing here: --no_mask",
        ),
        (
            ["--knn_standardize", "--knn_temperature", "0.5"],
            "--knn_standardize, --knn_temperature do nothing here: without --knn_freq there is no k-NN",
        ),
    ],
)
def test_flags_without_effect_are_named(flags, warning, data, codes, tmp_path, capsys):
    pretrain(data, tmp_path, codes, "--epochs", "1", *flags)
    assert f"warning: {warning}" in capsys.readouterr().out


def test_a_default_run_warns_of_nothing(data, codes, tmp_path, capsys):
    pretrain(data, tmp_path, codes, "--epochs", "1", "--min_mask_patches_per_block", "1")
    assert "nothing here" not in capsys.readouterr().out


# ── the CLS head's switches ──
@pytest.mark.parametrize(("early", "layers", "shared"), [(1, 3, "True"), (6, 1, "True"), (3, 2, "False")])
def test_switches_of_the_cls_head(early, layers, shared, data, codes, tmp_path, monkeypatch):
    built = []
    original = modeling_pretrain.create_model
    monkeypatch.setattr(
        modeling_pretrain, "create_model", lambda *a, **k: built.append(original(*a, **k)) or built[-1]
    )
    flags = [
        "--early_layers",
        str(early),
        "--head_layers",
        str(layers),
        "--shared_lm_head",
        shared,
        "--epochs",
        "1",
    ]
    pretrain(data, tmp_path, codes, *flags)
    (model,) = built
    assert (model.early_layers, len(model.cls_pt_layers)) == (early, layers)
    keys = checkpoint(tmp_path / "checkpoint.pth")["model"].keys()
    assert ("cls_pt_lm_head.weight" in keys) == (shared == "False")
    assert f"cls_pt_layers.{layers - 1}.attn.qkv.weight" in keys
    # the second branch sees the early layers' patches: what comes after reaches it
    # through the CLS token alone
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    _, early_tokens, _ = model.eval().encode_both(x, None)
    tokens, bias = model.embed(x), model.shared_bias()
    for block in model.blocks[:early]:
        tokens = block(tokens, bias)
    assert torch.allclose(early_tokens, tokens[:, 1:])


# ── the depth of the tokenizer's decoder ──
def test_a_tokenizer_of_another_decoder_depth(data, tmp_path, capsys):
    vqkd = vqkd_flags(
        data, tmp_path / "vqkd", "--decoder_depth", "2", "--quantize_kmeans_init", "--epochs", "1"
    )
    run_vqkd_training.main(vqkd)
    weights = tmp_path / "vqkd/checkpoint.pth"
    blocks = {key.split(".")[2] for key in checkpoint(weights)["model"] if key.startswith("decoder.blocks.")}
    assert blocks == {"0", "1"}
    flags = pretraining_flags(data, tmp_path / "pt", weights, "--epochs", "1")
    opened = run_beitv2_pretraining.build_tokenizer(
        arguments.parse(run_beitv2_pretraining.get_parser(), flags)
    )
    assert len(opened.decoder.blocks) == 2
    run_beitv2_pretraining.main(flags)

    evaluation = ["--eval", "--resume", str(weights), "--eval_data_path", str(data)]
    run_vqkd_training.main(vqkd_flags("/nowhere", tmp_path / "eval", *evaluation))
    assert "test_rec_loss" in capsys.readouterr().out
    assert f"the tokenizer in {weights} has a decoder of 2 blocks: leave --decoder_depth 3 out" in refused(
        run_vqkd_training.main,
        vqkd_flags("/nowhere", tmp_path / "eval", *evaluation, "--decoder_depth", "3"),
        capsys,
    )


def test_the_decoders_depth_is_the_names_unless_it_is_given():
    build = modeling_vqkd.vqkd_encoder_demo_decoder_1x128x4_hog
    small = {"img_size": 32, "n_code": 16, "code_dim": 8}
    assert [len(build(**small, **more).decoder.blocks) for more in ({}, {"decoder_depth": 3})] == [1, 3]
    with pytest.raises(UserError, match="decoder of 0 blocks"):
        tokenizer_weights.infer_decoder_depth({}, 1, "x")
