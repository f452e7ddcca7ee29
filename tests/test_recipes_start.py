"""Every recipe really starts: its own command line, with small data, models and weights at its end, trains one epoch."""

import pytest
import tiny_runs
import torch
from test_recipes import ABLATION_FILES, RECIPES, dry_run

import modeling_dvae
import modeling_finetune
import modeling_pretrain

ALL = [*RECIPES, *(f"ablations/{name}" for name in ABLATION_FILES)]
SMALL = [*tiny_runs.SIZE, "--batch_size", "4", "--update_freq", "1", "--epochs", "1"]
POSITIONS = dict(use_abs_pos_emb=False, init_values=0.1, img_size=32)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folders and weights that stand for ImageNet and the model zoo."""
    root = tmp_path_factory.mktemp("small")
    for split in ("train", "val"):
        tiny_runs.photos(root / "imagenet" / split, per_class=4)
    tiny_runs.tokenizer(root / "vqkd.pth")
    torch.save(modeling_dvae.DallEEncoder(8, 1, 16).state_dict(), root / "dvae.pth")
    student = modeling_pretrain.create_model(
        "beit_demo_patch16_128_8k_vocab", vocab_size=16, use_shared_rel_pos_bias=True, **POSITIONS
    )
    torch.save({"model": student.state_dict()}, root / "pretrained.pth")
    classifier = modeling_finetune.create_model("beit_demo_patch16_128", num_classes=7, use_rel_pos_bias=True, **POSITIONS)
    torch.save({"model": classifier.state_dict()}, root / "intermediate.pth")
    return root


def stand_ins(name, flags, small):
    """Flags that make a recipe small; what makes it this recipe (its switches, its schedule's shape) stays."""
    script = name.split("/")[-1]
    if script.startswith("vqkd"):
        model = ["--model", tiny_runs.TOKENIZER, "--teacher_model_type", "hog", "--teacher_input_size", "32"]
        return [*model, "--codebook_n_emd", "16", "--codebook_emd_dim", "8"]
    if script.startswith(("pretrain", "v1")):
        model = tiny_runs.STUDENT if "--early_layers" in flags else tiny_runs.STUDENT.removesuffix("_cls_pt")
        more = ["--model", model, "--codebook_size", "16"]
        if "--early_layers" in flags:
            more += ["--early_layers", "4", "--tokenizer_model", tiny_runs.TOKENIZER, "--codebook_dim", "8"]
            more += ["--tokenizer_weight", str(small / "vqkd.pth"), "--second_input_size", "32"]
        else:
            more += ["--tokenizer_weight", str(small / "dvae.pth"), "--second_input_size", "16"]
        steps = ["--warmup_steps", "1"] if "--warmup_steps" in flags else []
        return [*more, *steps, *(["--num_mask_patches", "2"] if "--no_mask" not in flags else [])]
    weights = "intermediate.pth" if "ft2" in name else "pretrained.pth"
    model = [] if script.startswith("linear") else ["--model", "beit_demo_patch16_128"]
    return [*model, "--nb_classes", "2", "--finetune", str(small / weights)]


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_trains(name, small, tmp_path, capsys):
    run = dry_run(name)
    images = small / "imagenet"
    if "image_folder" in run.flags:
        images = images / "train"
    where = ["--data_path", str(images), "--output_dir", str(tmp_path), "--log_dir", str(tmp_path)]
    run.entry.main([*run.flags, *where, *SMALL, *stand_ins(name, run.flags, small)])
    (line,) = tiny_runs.log_lines(tmp_path)
    assert line["train_loss"] == pytest.approx(line["train_loss"])  # a number
    evaluated = ("IMNET" in run.flags) and "--disable_eval_during_finetuning" not in run.flags
    assert ("test_acc1" in line) == evaluated
    assert (tmp_path / "checkpoint.pth").exists()
    assert "error" not in capsys.readouterr().err
