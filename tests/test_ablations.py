"""Each switch of pretraining, as main([...]) on tiny data: it does what it says, or is
refused, and its run resumes.
"""

import random
import re

import numpy as np
import pytest
import torch
from refusals import refused
from tiny_pretraining import NOWHERE, PLAIN, pixel_flags, pretrain, spy_on_steps
from tiny_runs import checkpoint, finetuning_flags, log_lines, pretraining_flags, vqkd_flags

import arguments
import masking_generator
import modeling_pretrain
import modeling_vqkd
import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
from checkpoint_io import tokenizer_weights
from errors import UserError
from flags.pretraining import build_mask_generator
from masking_generator import RandomMaskingGenerator


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


def test_mask_type_random_masks_single_patches(data, tokenizer_weight, tmp_path, monkeypatch):
    seen = spy_on_steps(monkeypatch)
    monkeypatch.setattr(
        masking_generator.MaskingGenerator, "_mask_block", lambda *_: pytest.fail("a block was masked")
    )
    lines = pretrain(data, tmp_path, tokenizer_weight, "--mask_type", "random", "--epochs", "1")
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


# ── positions ──
POSITIONS = {
    "relative": [],
    "absolute": ["--abs_pos_emb", "--disable_rel_pos_bias"],
    "both": ["--abs_pos_emb"],
    "none": ["--disable_rel_pos_bias"],
}


DEFAULT_POSITIONS = {"--abs_pos_emb": "no --abs_pos_emb", "--disable_rel_pos_bias": "--rel_pos_bias"}


@pytest.mark.slow
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
            "--codebook_dim, --codebook_size, --second_input_size, --tokenizer_model, --tokenizer_weight "
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
def test_flags_without_effect_are_named(flags, warning, data, tokenizer_weight, tmp_path, capsys):
    pretrain(data, tmp_path, tokenizer_weight, "--epochs", "1", *flags)
    assert f"warning: {warning}" in capsys.readouterr().out


def test_a_default_run_warns_of_nothing(data, tokenizer_weight, tmp_path, capsys):
    pretrain(data, tmp_path, tokenizer_weight, "--epochs", "1", "--min_mask_patches_per_block", "1")
    assert "nothing here" not in capsys.readouterr().out


# ── the CLS head's switches ──
@pytest.mark.parametrize(("early", "layers", "shared"), [(1, 3, "True"), (6, 1, "True"), (3, 2, "False")])
def test_switches_of_the_cls_head(early, layers, shared, data, tokenizer_weight, tmp_path, monkeypatch):
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
    pretrain(data, tmp_path, tokenizer_weight, *flags)
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
