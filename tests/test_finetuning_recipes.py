"""The shell files of fine-tuning, linear probes and segmentation give the published
settings.
"""

import re

import pytest
from recipe_runs import RECIPES, dry_run, expect

import modeling_finetune
import modeling_segmentation
import run_class_finetuning
import run_linear_eval
import run_segmentation_finetuning
from checkpoint_io import published
from flags import finetuning, linear_eval, segmentation

# name: GPUs, batch, update_freq, lr, epochs, warmup_epochs, layer_decay, drop_path,
# mixup, cutmix, weight_decay, from
FINETUNING = {
    "base_v2_1600e": (8, 128, 1, 5e-4, 100, 20, 0.6, 0.2, 0.8, 1.0, 0.05, "beitv2_base_patch16_224_pt1k"),
    "base_v2_300e": (
        8,
        128,
        1,
        5e-4,
        100,
        20,
        0.65,
        0.1,
        0.8,
        1.0,
        0.05,
        "beitv2_base_patch16_224_pt1k_300e",
    ),
    "base_v2_ft21k": (8, 128, 1, 5e-5, 30, 20, 0.75, 0.1, 0, 0, 0.05, "beitv2_base_patch16_224_pt1k_ft21k"),
    "large_v2_1600e": (8, 64, 2, 2e-4, 50, 5, 0.8, 0.2, 0.8, 1.0, 0.05, "beitv2_large_patch16_224_pt1k"),
    "large_v2_300e": (8, 64, 2, 5e-4, 50, 5, 0.8, 0.2, 0.8, 1.0, 0.05, "beitv2_large_patch16_224_pt1k_300e"),
    "large_v2_ft21k": (8, 64, 2, 7e-5, 20, 5, 0.8, 0.25, 0, 0, 0.05, "beitv2_large_patch16_224_pt1k_ft21k"),
    "base_v2_to_21k": (32, 128, 1, 6e-4, 90, 20, 0.75, 0.1, 0.8, 1.0, 0.05, "beitv2_base_patch16_224_pt1k"),
    "base_v1_pt22k": (8, 128, 1, 4e-3, 100, 20, 0.65, 0.1, 0.8, 1.0, 0.05, "beit_base_patch16_224_pt22k"),
    "large_v1_pt22k": (8, 64, 2, 1e-3, 50, 5, 0.75, 0.2, 0.8, 1.0, 0.05, "beit_large_patch16_224_pt22k"),
    "base_v1_pt22k_ft22k": (
        8,
        64,
        1,
        2e-5,
        30,
        5,
        0.85,
        0.1,
        0,
        0,
        1e-8,
        "beit_base_patch16_224_pt22k_ft22k",
    ),
    "large_v1_pt22k_ft22k": (
        8,
        32,
        2,
        2e-5,
        30,
        5,
        0.9,
        0.4,
        0,
        0,
        1e-8,
        "beit_large_patch16_224_pt22k_ft22k",
    ),
}


FINETUNING = {f"finetune/{name}": row for name, row in FINETUNING.items()}


# name: protocol, flag of the rate and its value, weight decay, features, from
LINEAR = {
    "base_v2_1600e": ("ours", {"lr": 1e-3}, 0, "cls", "beitv2_base_patch16_224_pt1k"),
    "base_v1_pt22k": ("published", {"lr": 4e-3}, 1e-4, "cls_mean", "beit_base_patch16_224_pt22k"),
    "large_v1_pt22k": ("published", {"base_lr": 1e-3}, 1e-4, "cls_mean", "beit_large_patch16_224_pt22k"),
}


LINEAR = {f"linear/{name}": row for name, row in LINEAR.items()}


# name: model, layer_scale_init_value, drop_path, layer_decay, lr, from, published mIoU
# (None: not published for these weights)
SEGMENTATION = {
    "base_v2_1600e": (
        "upernet_beit_base_patch16",
        0.1,
        0.15,
        0.75,
        5e-5,
        "beitv2_base_patch16_224_pt1k",
        "53.1",
    ),
    "base_v2_ft21k": (
        "upernet_beit_base_patch16",
        0.1,
        0.15,
        0.85,
        5e-5,
        "beitv2_base_patch16_224_pt1k_ft21k",
        "53.5",
    ),
    "large_v2_1600e": (
        "upernet_beit_large_patch16",
        1e-6,
        0.2,
        0.9,
        4e-5,
        "beitv2_large_patch16_224_pt1k",
        "56.7",
    ),
    "large_v2_ft21k": (
        "upernet_beit_large_patch16",
        1e-6,
        0.2,
        0.9,
        3e-5,
        "beitv2_large_patch16_224_pt1k_ft21k",
        "57.5",
    ),
    "base_v1_setr_pup": (
        "setr_pup_beit_base_patch16",
        0.1,
        0.15,
        0.75,
        5e-5,
        "beit_base_patch16_224_pt22k",
        None,
    ),
}


SEGMENTATION = {f"segment/{name}": row for name, row in SEGMENTATION.items()}


def test_every_recipe_has_a_row_here_and_the_other_way_round():
    names = {name for name in RECIPES if name.startswith(("finetune/", "linear/", "segment/"))}
    assert names == {*FINETUNING, *LINEAR, *SEGMENTATION}


@pytest.mark.parametrize("name", FINETUNING)
def test_finetuning_recipes(name):
    (
        gpus,
        batch_size,
        update_freq,
        lr,
        epochs,
        warmup,
        layer_decay,
        drop_path,
        mixup,
        cutmix,
        weight_decay,
        weights,
    ) = FINETUNING[name]
    run = dry_run(name)
    assert (run.entry, run.gpus, run.batch) == (run_class_finetuning, gpus, gpus * batch_size * update_freq)
    to_21k, v2 = name.endswith("to_21k"), "_v2" in name
    expect(
        run,
        model=f"beit_{name.split('/')[1].split('_')[0]}_patch16_224",
        finetune=weights,
        data_path="/data",
        output_dir="/out",
    )
    expect(
        run,
        batch_size=batch_size,
        update_freq=update_freq,
        lr=lr,
        epochs=epochs,
        warmup_epochs=warmup,
        min_lr=1e-6,
    )
    expect(
        run,
        layer_decay=layer_decay,
        drop_path=drop_path,
        mixup=mixup,
        cutmix=cutmix,
        weight_decay=weight_decay,
    )
    expect(run, smoothing=0.1, aa="rand-m9-mstd0.5-inc1", reprob=0.25, nb_classes=21841 if to_21k else 1000)
    assert run.args.data_set == ("image_folder" if to_21k else "IMNET")
    assert run.args.disable_eval_during_finetuning is to_21k
    assert run.args.imagenet_default_mean_and_std is v2
    assert run.args.use_mean_pooling
    assert run.args.rel_pos_bias
    assert not run.args.model_ema
    finetuning.check_flags(run.args)
    entry = published.ENTRIES[weights]
    assert entry.kind == ("intermediate" if "ft2" in name else "pretrained")
    assert entry.model.startswith(run.args.model)
    assert run.args.model in modeling_finetune.MODELS


@pytest.mark.parametrize("name", LINEAR)
def test_linear_probe_recipes(name):
    protocol, rate, weight_decay, features, weights = LINEAR[name]
    run = dry_run(name)
    assert (run.entry, run.gpus, run.batch) == (run_linear_eval, 8, 1024)
    args = linear_eval.parse_flags(run.flags)
    assert run_linear_eval.find_lr(args, run.batch) == pytest.approx(4e-3)
    assert args.protocol == protocol
    if protocol == "published":
        expect(run, protocol=protocol, train_interpolation="bilinear")
    expect(
        run,
        finetune=weights,
        features=features,
        data_set="IMNET",
        data_path="/data",
        output_dir="/out",
        nb_classes=1000,
    )
    expect(
        run,
        batch_size=128,
        epochs=100,
        opt="adamw",
        min_lr=0,
        weight_decay=weight_decay,
        **rate,
        min_crop_scale=0.08,
        color_jitter=0,
    )
    assert run.args.imagenet_default_mean_and_std is ("v2" in name)
    assert run.args.mode == "linear"
    assert not run.args.cached_features
    assert published.ENTRIES[weights].kind == "pretrained"


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_recipes(name):
    model, layer_scale, drop_path, layer_decay, lr, weights, miou = SEGMENTATION[name]
    run = dry_run(name)
    assert (run.entry, run.gpus, run.batch) == (run_segmentation_finetuning, 8, 16)
    expect(
        run,
        model=model,
        finetune=weights,
        data_path="/data",
        output_dir="/out",
        nb_classes=150,
        reduce_zero_label=True,
    )
    expect(
        run, layer_scale_init_value=layer_scale, drop_path=drop_path, layer_decay=layer_decay, lr=lr, min_lr=0
    )
    expect(
        run,
        max_steps=160000,
        warmup_steps=1500,
        poly_power=1.0,
        input_size=512,
        batch_size=2,
        steps_per_epoch=16000,
    )
    expect(run, opt="adamw", opt_betas=[0.9, 0.999], weight_decay=0.05)
    assert run.args.imagenet_default_mean_and_std is ("v2" in name)
    assert (run.args.scale_range, run.args.max_class_share, run.args.hflip) == ([0.5, 2.0], 0.75, 0.5)
    assert segmentation.build_sliding_window(run.args).stride == 341
    segmentation.check_flags(run.args)
    assert model in modeling_segmentation.MODELS
    assert published.ENTRIES[weights].kind == ("intermediate" if "ft21k" in name else "pretrained")
    expected = re.search(r"^# Expected: (.*)$", RECIPES[name], flags=re.MULTILINE)[1]
    assert expected.startswith(f"mIoU {miou}" if miou else "none at hand")
