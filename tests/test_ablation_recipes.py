"""The shell files in scripts/ablations/ change one thing of a recipe, and say which."""

import re
import shlex
from types import SimpleNamespace

import pytest
from recipe_runs import ABLATION_FILES, call, dry_run

import arguments
import run_class_finetuning
from evaluation import trained_classifier
from flags import pretraining, vqkd

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


# Ablations of v2's tokenizer. name: what differs from vqkd/base_3x768x12_clip, what
# pretraining with it needs
ABLATIONS_VQKD = {
    "v2_codebook_size_1024": ({"codebook_n_emd": 1024}, {"codebook_size": 1024}),
    "v2_codebook_dim_16": ({"codebook_emd_dim": 16}, {"codebook_dim": 16}),
    "v2_codebook_dim_64": ({"codebook_emd_dim": 64}, {"codebook_dim": 64}),
    "v2_decoder_depth_1": ({"decoder_depth": 1}, {}),
    "v2_decoder_depth_6": ({"decoder_depth": 6}, {}),
    "v2_teacher_dino": ({"teacher_model_type": "dino"}, {}),
}


def ablation(name: str, recipe: str) -> tuple[SimpleNamespace, dict[str, object]]:
    """What the ablation would run, and the flags in which that differs from the
    recipe.
    """
    base, run = dry_run(recipe), dry_run(f"ablations/{name}")
    assert (run.entry, run.launcher) == (base.entry, base.launcher)
    return run, {key: value for key, value in run.args.plain().items() if value != getattr(base.args, key)}


def said_of(name: str, what: str) -> str:
    """The line `# WHAT: ...` in an ablation's head."""
    return re.search(rf"^# {what}: (.*)$", ABLATION_FILES[name], flags=re.MULTILINE)[1]


def test_every_ablation_has_a_row_here_and_the_other_way_round():
    assert ABLATION_FILES.keys() == {*ABLATIONS_V1, *ABLATIONS_V2, *ABLATIONS_VQKD}


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
    """With the flags that the head names, and with no others, nothing of the
    pretraining is dropped.
    """
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
    assert {k: v for k, v in pretraining.plain().items() if v != getattr(dry_run(recipe).args, k)} == {
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
