"""The shell files in scripts/ give the published settings: what they would run is parsed
and compared with the tables here.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import arguments
import modeling_finetune
import modeling_pretrain
import modeling_segmentation
import modeling_vqkd
import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_segmentation_finetuning
import run_vqkd_training
from checkpoint_io import published
from evaluation import trained_classifier
from flags import finetuning, linear_eval, pretraining, segmentation, vqkd

ROOT = Path(__file__).parent.parent
SHELL_FILES = sorted((ROOT / "scripts").rglob("*.sh"))
RECIPES = {
    f"{path.parent.name}/{path.stem}": path.read_text()
    for path in SHELL_FILES
    if "\nlaunch run_" in path.read_text()
}
ABLATION_FILES = {path.stem: path.read_text() for path in SHELL_FILES if path.parent.name == "ablations"}
ENTRIES = {
    "run_vqkd_training.py": run_vqkd_training,
    "run_beitv2_pretraining.py": run_beitv2_pretraining,
    "run_class_finetuning.py": run_class_finetuning,
    "run_linear_eval.py": run_linear_eval,
    "run_segmentation_finetuning.py": run_segmentation_finetuning,
}

# name: model, teacher
VQKD = {
    "vqkd/base_3x768x12_clip": ("vqkd_encoder_base_decoder_3x768x12_clip", "clip"),
    "vqkd/base_1x768x12_clip": ("vqkd_encoder_base_decoder_1x768x12_clip", "clip"),
    "vqkd/base_1x768x12_dino": ("vqkd_encoder_base_decoder_1x768x12_dino", "dino"),
}
# name: size, epochs, GPUs, batch of each, early_layers, layer_scale_init_value, drop_path, betas
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
# Ablations of v1. name: what differs from pretrain/base_v1_in1k, published top-1 and
# mIoU (None: not published)
ABLATIONS_V1 = {
    "v1_300e": ({}, "82.86", "44.65"),
    "v1_random_masks": ({"mask_type": "random"}, "82.77", "42.93"),
    "v1_pixels": ({"target": "pixels"}, "81.04", "41.38"),
    "v1_pixels_random_masks": ({"target": "pixels", "mask_type": "random"}, "80.50", "37.09"),
    "v1_predict_all": ({"predict": "all"}, "82.59", "40.93"),
    "v1_no_mask": ({"no_mask": True, "num_mask_patches": 0}, "81.67", "36.73"),
    "v1_positions_absolute": ({"abs_pos_emb": True, "rel_pos_bias": False}, None, None),
    "v1_positions_both": ({"abs_pos_emb": True}, None, None),
    "v1_positions_none": ({"rel_pos_bias": False}, None, None),
}
# Ablations of v2's pretraining. name: what differs from pretrain/base_300e
ABLATIONS_V2 = {
    "v2_early_layers_6": {"early_layers": 6},
    "v2_early_layers_12": {"early_layers": 12},
    "v2_head_layers_1": {"head_layers": 1},
    "v2_head_layers_3": {"head_layers": 3},
    "v2_own_head": {"shared_lm_head": False},
    "v2_no_cls_head": {"model": "beit_base_patch16_224_8k_vocab"},
}
# Ablations of v2's tokenizer. name: what differs from vqkd/base_3x768x12_clip, what pretraining with it needs
ABLATIONS_VQKD = {
    "v2_codebook_size_1024": ({"codebook_n_emd": 1024}, {"codebook_size": 1024}),
    "v2_codebook_dim_16": ({"codebook_emd_dim": 16}, {"codebook_dim": 16}),
    "v2_codebook_dim_64": ({"codebook_emd_dim": 64}, {"codebook_dim": 64}),
    "v2_decoder_depth_1": ({"decoder_depth": 1}, {}),
    "v2_decoder_depth_6": ({"decoder_depth": 6}, {}),
    "v2_teacher_dino": ({"teacher_model_type": "dino"}, {}),
}
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
# name: features, from
LINEAR = {
    "linear/base_v2_1600e": ("cls", "beitv2_base_patch16_224_pt1k"),
    "linear/base_v1_pt22k": ("cls_mean", "beit_base_patch16_224_pt22k"),
    "linear/large_v1_pt22k": ("cls_mean", "beit_large_patch16_224_pt22k"),
}
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


def call(name: str, *flags: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """bash scripts/NAME.sh with nothing else in its environment."""
    command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *flags]
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def dry_run(name: str, *flags: str, **environment: str) -> SimpleNamespace:
    """What the recipe would run: the launcher's words, nodes, GPUs a node, the script's
    flags as typed and as parsed.
    """
    defaults = {"DRY_RUN": "1", "DATA": "/data", "OUTPUT": "/out", "NODE_RANK": "0", "MASTER_ADDR": "node0"}
    done = call(name, *flags, **{**defaults, **environment})
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    at = next(i for i, word in enumerate(words) if word in ENTRIES)
    entry, launcher = ENTRIES[words[at]], words[:at]
    args = arguments.parse(entry.get_parser(), words[at + 1 :])
    nodes, gpus = (int(launcher[launcher.index(flag) + 1]) for flag in ("--nnodes", "--nproc_per_node"))
    batch = nodes * gpus * args.batch_size * args.update_freq
    return SimpleNamespace(
        entry=entry, launcher=launcher, gpus=nodes * gpus, batch=batch, flags=words[at + 1 :], args=args
    )


def expect(run: SimpleNamespace, **values: object) -> None:
    """Each flag is written out in the recipe (a changed default must not change it) and has this value."""
    for name, value in values.items():
        assert f"--{name}" in run.flags, name
        assert getattr(run.args, name) == value, name


def test_every_recipe_has_a_row_here_and_the_other_way_round():
    assert RECIPES.keys() == {*VQKD, *PRETRAINING, *PRETRAINING_V1, *FINETUNING, *LINEAR, *SEGMENTATION}
    assert ABLATION_FILES.keys() == {*ABLATIONS_V1, *ABLATIONS_V2, *ABLATIONS_VQKD}


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


def ablation(name: str, recipe: str) -> tuple[SimpleNamespace, dict[str, object]]:
    """What the ablation would run, and the flags in which that differs from the recipe."""
    base, run = dry_run(recipe), dry_run(f"ablations/{name}")
    assert (run.entry, run.launcher) == (base.entry, base.launcher)
    return run, {key: value for key, value in vars(run.args).items() if value != getattr(base.args, key)}


def said_of(name: str, what: str) -> str:
    """The line `# WHAT: ...` in an ablation's head."""
    return re.search(rf"^# {what}: (.*)$", ABLATION_FILES[name], flags=re.MULTILINE)[1]


@pytest.mark.parametrize("name", ABLATIONS_V1)
def test_ablations_of_v1_change_one_thing(name):
    switches, top1, miou = ABLATIONS_V1[name]
    run, differing = ablation(name, "pretrain/base_v1_in1k")
    assert differing == {"epochs": 300, **switches}
    pretraining.check_flags(run.args)
    assert pretraining.student_grid(run.args) == 14
    expected = said_of(name, "Expected")
    assert expected.startswith(f"{top1} % top-1" if top1 else "not published")
    assert miou is None or f" {miou} mIoU" in expected


@pytest.mark.parametrize("name", [name for name in ABLATIONS_V1 if "positions" in name])
def test_fine_tuning_keeps_the_positions_of_an_ablation(name):
    """With the flags that the head names, and with no others, nothing of the pretraining is dropped."""
    pretraining = dry_run(f"ablations/{name}").args
    words = said_of(name, "Fine-tune with the same positions").split()
    args = arguments.parse(run_class_finetuning.get_parser(), ["--data_path", "/data", *words])
    for flag in trained_classifier.KEPT_FROM_PRETRAINING:
        assert getattr(args, flag) == getattr(pretraining, flag), flag


@pytest.mark.parametrize("name", ABLATIONS_V2)
def test_ablations_of_v2s_pretraining_change_one_thing(name):
    run, differing = ablation(name, "pretrain/base_300e")
    assert differing == ABLATIONS_V2[name]
    pretraining.check_flags(run.args)
    assert pretraining.student_grid(run.args) == 14
    changed = arguments.changed_flags(run.entry.get_parser(), run.args)
    assert pretraining.idle_flags(run.args).keys() & changed.keys() == set()
    assert said_of(name, "Expected").startswith("no figure at hand")


@pytest.mark.parametrize("name", ABLATIONS_VQKD)
def test_tokenizer_ablations_change_one_thing_and_name_flags(name):
    switches, more = ABLATIONS_VQKD[name]
    run, differing = ablation(name, "vqkd/base_3x768x12_clip")
    assert differing == switches
    vqkd.check_flags(run.entry.get_parser(), run.args)
    expected = said_of(name, "Expected")
    assert expected.startswith(
        "100 % of the codebook" if name == "v2_decoder_depth_1" else "no figure at hand"
    )

    recipe, flags = re.fullmatch(
        r"DATA=\.\.\. OUTPUT=\.\.\. bash scripts/([\w/]+)\.sh (.+)", said_of(name, "Then")
    ).groups()
    pretraining = dry_run(recipe, *flags.split()).args
    weights = "/path/to/save/checkpoint.pth"
    assert {k: v for k, v in vars(pretraining).items() if v != getattr(dry_run(recipe).args, k)} == {
        "tokenizer_weight": weights,
        **more,
    }
    assert (pretraining.codebook_size, pretraining.codebook_dim) == (
        run.args.codebook_n_emd,
        run.args.codebook_emd_dim,
    )
    assert pretraining.tokenizer_model == run.args.model


def test_an_ablation_explains_itself_and_takes_more_flags(tmp_path):
    done = call("ablations/v1_pixels", OUTPUT="/out")
    assert done.returncode == 2
    assert "bash scripts/ablations/v1_pixels.sh [more flags]" in done.stderr
    assert dry_run("ablations/v1_pixels", "--epochs", "7", GPUS="2").args.epochs == 7
    (tmp_path / "photos").mkdir()
    words = shlex.split(
        call("ablations/v1_pixels", cwd=tmp_path, DATA="photos", OUTPUT="out", DRY_RUN="1").stdout
    )
    assert words[words.index("--data_path") + 1] == str(tmp_path / "photos")


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
    features, weights = LINEAR[name]
    run = dry_run(name)
    assert (run.entry, run.gpus, run.batch) == (run_linear_eval, 8, 1024)
    assert run.args.lr * run.batch / 256 == pytest.approx(4e-3)
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
        weight_decay=0,
        min_crop_scale=0.08,
        color_jitter=0,
    )
    assert run.args.imagenet_default_mean_and_std is ("v2" in name)
    assert run.args.mode == "linear"
    assert not run.args.cached_features
    linear_eval.check_flags(run_linear_eval.get_parser(), run.args)
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


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_syntax(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_missing_data_is_one_clear_sentence(name):
    done = call(name, OUTPUT="/out")
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: DATA is not set; scripts/{name}\.sh runs as: DATA=/\S+ OUTPUT=/\S+ " r"bash .*\n",
        done.stderr,
    )


FLAWED = [
    ({"DATA": "/"}, "OUTPUT is not set"),
    ({"DATA": "/no/such", "OUTPUT": "/out"}, "DATA=/no/such: no such folder"),
    ({"DATA": "/", "OUTPUT": "/out", "GPUS": "none"}, "GPUS=none: give a whole number"),
    ({"DATA": "/", "OUTPUT": "/out"}, "4 machines: MASTER_ADDR must be"),
    (
        {"DATA": "/", "OUTPUT": "/out", "MASTER_ADDR": "node0"},
        "NODE_RANK=: each of the 4 machines needs its own number, 0 to 3",
    ),
    (
        {"DATA": "/", "OUTPUT": "/out", "MASTER_ADDR": "node0", "NODE_RANK": "4"},
        "NODE_RANK=4: each of the 4 machines",
    ),
    (
        {"DATA": "/", "OUTPUT": "/out", "MASTER_ADDR": "node0", "SLURM_STEP_NUM_TASKS": "4"},
        "srun started 4 tasks, but",
    ),
]


@pytest.mark.parametrize(("environment", "message"), FLAWED)
def test_what_cannot_be_launched_is_refused(environment, message):
    done = call("pretrain/large_300e", **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stdout == ""


def test_paths_count_from_the_caller_and_may_hold_spaces(tmp_path):
    (tmp_path / "my photos").mkdir()
    done = call("pretrain/base_300e", cwd=tmp_path, DATA="my photos", OUTPUT="out", DRY_RUN="1")
    words = shlex.split(done.stdout)
    assert words[words.index("--data_path") + 1] == str(tmp_path / "my photos")
    assert words[words.index("--output_dir") + 1] == str(tmp_path / "out")


def test_the_callers_flags_win():
    run = dry_run(
        "pretrain/base_300e", "--lr", "1e-3", "--opt_betas", "0.8", "0.9", "--update_freq", "4", GPUS="2"
    )
    assert (run.args.lr, run.args.opt_betas, run.gpus, run.batch) == (1e-3, [0.8, 0.9], 2, 1024)


def test_several_machines_find_each_other():
    launcher = dry_run("pretrain/large_300e", NODE_RANK="3", MASTER_PORT="1234").launcher
    assert " ".join(launcher) == (
        "torchrun --nnodes 4 --nproc_per_node 16 --master_port 1234 --node_rank 3 --master_addr node0"
    )


def test_under_srun_no_second_launcher_is_started():
    done = call("pretrain/base_300e", DATA="/", OUTPUT="/out", DRY_RUN="1", SLURM_STEP_NUM_TASKS="16")
    assert done.stdout.startswith("python run_beitv2_pretraining.py ")


def test_the_launcher_gets_the_flags_as_they_are(tmp_path):
    """Not a dry run: a stand-in for torchrun prints its arguments."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n')
    (tmp_path / "torchrun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = call("vqkd/base_3x768x12_clip", "--log_dir", "a b", PATH=path, DATA=str(tmp_path), OUTPUT="/out")
    assert done.returncode == 3  # the launcher's own status
    words = done.stdout.splitlines()
    assert words[:4] == ["--nnodes", "1", "--nproc_per_node", "8"]
    assert words[-2:] == ["--log_dir", "a b"]


def test_the_documentation_has_a_row_for_each():
    text = (ROOT / "docs/recipes.md").read_text()
    assert [name for name in RECIPES if f"`{name}.sh`" not in text] == []
    text = (ROOT / "docs/ablations.md").read_text()
    assert [name for name in ABLATION_FILES if f"`{name}.sh`" not in text] == []
