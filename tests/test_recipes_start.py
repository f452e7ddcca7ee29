"""Every recipe really starts: its own command line, with small data, models and weights
at its end, trains one epoch.
"""

import pytest
import tiny_runs
import torch
from recipe_runs import ABLATION_FILES, RECIPES, dry_run

import modeling_dvae
import modeling_finetune
import modeling_pretrain
import run_beitv2_pretraining
import run_linear_eval
import run_segmentation_finetuning
import run_vqkd_training
from vit_backbone import SIZES

ALL = [*RECIPES, *(f"ablations/{name}" for name in ABLATION_FILES)]
SMALL = [*tiny_runs.SIZE, "--batch_size", "4", "--update_freq", "1"]
ONE_EPOCH = ["--epochs", "1"]
POSITIONS = dict(use_abs_pos_emb=False, init_values=0.1, img_size=32)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folders and weights that stand for ImageNet and the model zoo."""
    root = tmp_path_factory.mktemp("small")
    for split in ("train", "val"):
        tiny_runs.photos(root / "imagenet" / split, per_class=4)
    tiny_runs.labeled_pixels(root / "ade20k", classes=7)
    tiny_runs.tokenizer(root / "vqkd.pth")
    torch.save(modeling_dvae.DallEEncoder(8, 1, 16).state_dict(), root / "dvae.pth")
    student = modeling_pretrain.create_model(
        "beit_demo_patch16_128_8k_vocab", vocab_size=16, use_shared_rel_pos_bias=True, **POSITIONS
    )
    torch.save({"model": student.state_dict()}, root / "pretrained.pth")
    classifier = modeling_finetune.create_model(
        "beit_demo_patch16_128", num_classes=7, use_rel_pos_bias=True, **POSITIONS
    )
    torch.save({"model": classifier.state_dict()}, root / "intermediate.pth")
    return root


def stand_ins(name, run, small):
    """Flags that make a recipe small; what makes it this recipe (its switches, its
    schedule's shape) stays, or shrinks.
    """
    flags, args = run.flags, run.args
    if run.entry is run_vqkd_training:
        teacher = ["--teacher_weight", "random"] if "teacher" in name else ["--teacher_model_type", "hog"]
        more = ["--model", tiny_runs.TOKENIZER, *teacher, "--teacher_input_size", "32"]
        return [
            *more,
            "--codebook_n_emd",
            str(args.codebook_n_emd // 512),
            "--codebook_emd_dim",
            str(args.codebook_emd_dim // 4),
            *ONE_EPOCH,
        ]
    if run.entry is run_beitv2_pretraining:
        model = (
            tiny_runs.STUDENT if args.model.endswith("_cls_pt") else tiny_runs.STUDENT.removesuffix("_cls_pt")
        )
        more = ["--model", model, "--codebook_size", "16"]
        if "--early_layers" in flags:
            early = args.early_layers * SIZES["demo"].depth // SIZES[args.model.split("_")[1]].depth
            more += [
                "--early_layers",
                str(early),
                "--tokenizer_model",
                tiny_runs.TOKENIZER,
                "--codebook_dim",
                "8",
            ]
            more += ["--tokenizer_weight", str(small / "vqkd.pth"), "--second_input_size", "32"]
        else:
            more += ["--tokenizer_weight", str(small / "dvae.pth"), "--second_input_size", "16"]
        steps = ["--warmup_steps", "1"] if "--warmup_steps" in flags else []
        return [*more, *steps, *(["--num_mask_patches", "2"] if "--no_mask" not in flags else []), *ONE_EPOCH]
    weights = "intermediate.pth" if "ft2" in name else "pretrained.pth"
    if run.entry is run_segmentation_finetuning:
        steps = ["--max_steps", "2", "--warmup_steps", "1", "--steps_per_epoch", "2"]
        model = args.model.replace(args.model.split("_beit_")[1], "demo_patch16")
        return ["--model", model, *steps, "--nb_classes", "7", "--finetune", str(small / weights)]
    model = [] if run.entry is run_linear_eval else ["--model", "beit_demo_patch16_128"]
    return [*ONE_EPOCH, *model, "--nb_classes", "2", "--finetune", str(small / weights)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_recipe_trains(name, small, tmp_path, capsys):
    run = dry_run(name)
    images = small / "imagenet"
    if "image_folder" in run.flags:
        images = images / "train"
    if run.entry is run_segmentation_finetuning:
        images = small / "ade20k"
    where = ["--data_path", str(images), "--output_dir", str(tmp_path), "--log_dir", str(tmp_path)]
    run.entry.main([*run.flags, *where, *SMALL, *stand_ins(name, run, small)])
    (line,) = tiny_runs.log_lines(tmp_path)
    assert line["train_loss"] == pytest.approx(line["train_loss"])  # a number
    evaluated = ("IMNET" in run.flags) and "--disable_eval_during_finetuning" not in run.flags
    assert ("test_acc1" in line) == evaluated
    assert ("test_miou" in line) == (run.entry is run_segmentation_finetuning)
    assert (tmp_path / "checkpoint.pth").exists()
    assert "error" not in capsys.readouterr().err
