"""The shell files in scripts/ give the published settings: what they would run is
parsed and compared with the tables here.
"""

import re
import shlex

import pytest
from recipe_runs import ABLATION_FILES, RECIPES, dry_run, expect
from source_files import ROOT

import arguments
import modeling_pretrain
import modeling_vqkd
import run_beitv2_pretraining
import run_vqkd_training
from checkpoint_io import published
from flags import pretraining, vqkd

STAGES = ("vqkd", "pretrain", "finetune", "linear", "segment")

# name: model, teacher
VQKD = {
    "vqkd/base_3x768x12_clip": ("vqkd_encoder_base_decoder_3x768x12_clip", "clip"),
    "vqkd/base_1x768x12_clip": ("vqkd_encoder_base_decoder_1x768x12_clip", "clip"),
    "vqkd/base_1x768x12_dino": ("vqkd_encoder_base_decoder_1x768x12_dino", "dino"),
}


# name: size, epochs, GPUs, batch of each, early_layers, layer_scale_init_value,
# drop_path, betas
PRETRAINING = {
    "pretrain/base_300e": ("base", 300, 16, 128, 9, 0.1, 0.0, [0.9, 0.98]),
    "pretrain/base_1600e": ("base", 1600, 16, 128, 9, 0.1, 0.1, [0.9, 0.999]),
    "pretrain/large_300e": ("large", 300, 64, 32, 21, 1e-5, 0.0, [0.9, 0.98]),
    "pretrain/large_1600e": ("large", 1600, 64, 32, 21, 1e-5, 0.1, [0.9, 0.999]),
}


# BEiT v1. name: size, data, epochs, warm-up, GPUs, batch of each,
# layer_scale_init_value, ImageNet's mean and std
PRETRAINING_V1 = {
    "pretrain/base_v1_in1k": ("base", "imagenet-1k", 800, {"warmup_epochs": 10}, 16, 128, 0.1, True),
    "pretrain/large_v1_in1k": ("large", "imagenet-1k", 800, {"warmup_epochs": 10}, 64, 32, 1e-5, True),
    "pretrain/base_v1_in22k": ("base", "imagenet-22k", 150, {"warmup_steps": 10000}, 16, 128, 0.1, False),
    "pretrain/large_v1_in22k": ("large", "imagenet-22k", 150, {"warmup_steps": 10000}, 64, 32, 1e-5, False),
}


def test_every_recipe_has_a_row_here_and_the_other_way_round():
    stages = {stage: {name for name in RECIPES if name.startswith(f"{stage}/")} for stage in STAGES}
    assert stages["vqkd"] == VQKD.keys()
    assert stages["pretrain"] == {*PRETRAINING, *PRETRAINING_V1}
    assert RECIPES.keys() == set().union(*stages.values())


@pytest.mark.parametrize("name", VQKD)
def test_tokenizer_recipes(name):
    model, teacher = VQKD[name]
    run = dry_run(name)
    assert (run.entry, run.gpus, run.batch) == (run_vqkd_training, 8, 512)
    expect(
        run,
        model=model,
        teacher_model_type=teacher,
        data_set="image_folder",
        data_path="/data",
        output_dir="/out",
    )
    expect(
        run,
        batch_size=64,
        epochs=100,
        warmup_epochs=10,
        lr=5e-5,
        min_lr=1e-5,
        weight_decay=1e-4,
        opt_betas=[0.9, 0.99],
    )
    expect(
        run,
        codebook_n_emd=8192,
        codebook_emd_dim=32,
        ema_decay=0.99,
        quantize_kmeans_init=True,
        rec_loss_type="cosine",
    )
    expect(
        run,
        min_crop_scale=0.08,
        color_jitter=0,
        train_interpolation="bicubic",
        process_type="default",
        opt="adamw",
    )
    vqkd.check_flags(run.entry.get_parser(), run.args)
    assert model in modeling_vqkd.MODELS
    assert model in published.ENTRIES


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_recipes(name):
    size, epochs, gpus, batch_size, early_layers, layer_scale, drop_path, betas = PRETRAINING[name]
    run = dry_run(name)
    assert (run.entry, run.gpus, run.batch) == (run_beitv2_pretraining, gpus, 2048)
    expect(
        run,
        model=f"beit_{size}_patch16_224_8k_vocab_cls_pt",
        data_set="image_folder",
        data_path="/data",
        output_dir="/out",
    )
    expect(
        run,
        epochs=epochs,
        batch_size=batch_size,
        opt_betas=betas,
        drop_path=drop_path,
        layer_scale_init_value=layer_scale,
    )
    expect(
        run, early_layers=early_layers, head_layers=2, shared_lm_head=True, imagenet_default_mean_and_std=True
    )
    expect(run, lr=1.5e-3, warmup_epochs=10, clip_grad=3.0, weight_decay=0.05, opt="adamw", opt_eps=1e-8)
    expect(
        run, num_mask_patches=75, min_crop_scale=0.2, second_input_size=224, second_interpolation="bicubic"
    )
    expect(
        run,
        **dict.fromkeys(("tokenizer_model", "tokenizer_weight"), "vqkd_encoder_base_decoder_3x768x12_clip"),
    )
    pretraining.check_flags(run.args)
    assert pretraining.student_grid(run.args) == 14
    assert run.args.model in modeling_pretrain.MODELS
    assert run.args.tokenizer_model in modeling_vqkd.MODELS
    assert published.ENTRIES[run.args.tokenizer_weight].kind == "tokenizer"


@pytest.mark.parametrize("name", PRETRAINING_V1)
def test_pretraining_recipes_of_v1(name):
    size, data, epochs, warm_up, gpus, batch_size, layer_scale, imagenet_mean = PRETRAINING_V1[name]
    assert f"DATA=/path/to/{data}" in RECIPES[name]
    run = dry_run(name)
    assert (run.entry, run.gpus, run.batch) == (run_beitv2_pretraining, gpus, 2048)
    expect(
        run,
        model=f"beit_{size}_patch16_224_8k_vocab",
        data_set="image_folder",
        data_path="/data",
        output_dir="/out",
    )
    expect(
        run,
        epochs=epochs,
        batch_size=batch_size,
        layer_scale_init_value=layer_scale,
        drop_path=0.1,
        **warm_up,
    )
    expect(
        run, lr=1.5e-3, clip_grad=3.0, weight_decay=0.05, opt="adamw", opt_eps=1e-8, opt_betas=[0.9, 0.999]
    )
    expect(run, num_mask_patches=75, min_mask_patches_per_block=16, min_crop_scale=0.08, color_jitter=0.4)
    expect(run, second_input_size=112, second_interpolation="lanczos", codebook_size=8192)
    expect(run, tokenizer_model="dall-e", tokenizer_weight="dall_e_encoder")
    assert run.args.imagenet_default_mean_and_std is imagenet_mean
    assert (run.args.rel_pos_bias, run.args.abs_pos_emb) == (True, False)
    pretraining.check_flags(run.args)
    assert pretraining.student_grid(run.args) == 14
    assert (
        pretraining.idle_flags(run.args).keys() & arguments.changed_flags(run.entry.get_parser(), run.args)
        == set()
    )
    assert published.ENTRIES[run.args.tokenizer_weight].kind == "tokenizer-v1"


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_says_what_to_expect_and_fewer_gpus_keep_batch(name):
    head = [
        line for line in RECIPES[name].split("set -euo pipefail")[0].splitlines() if line.startswith("# ")
    ]
    text = "\n".join(head)
    for part in ("Hardware", "Time", "Expected", "Fewer GPUs"):
        assert re.search(rf"^# {part}: \S", text, re.MULTILINE), part
    assert f"bash scripts/{name}.sh" in text
    full = dry_run(name)
    assert f"= {full.batch}" in text
    variables, flags, batch = re.search(r"Fewer GPUs: `(.+) \.\.\. (.+)` keeps .* at (\d+)", text).groups()
    fewer = dry_run(name, *shlex.split(flags), **dict(word.split("=") for word in variables.split()))
    assert fewer.gpus < full.gpus
    assert fewer.batch == full.batch == int(batch)


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_uses_a_flag_that_does_nothing(name):
    run = dry_run(name)
    assert not arguments.OBSOLETE.keys() & {flag[2:] for flag in run.flags if flag.startswith("--")}


def test_the_documentation_has_a_row_for_each():
    text = (ROOT / "docs/recipes.md").read_text()
    assert [name for name in RECIPES if f"`{name}.sh`" not in text] == []
    text = (ROOT / "docs/ablations.md").read_text()
    assert [name for name in ABLATION_FILES if f"`{name}.sh`" not in text] == []
