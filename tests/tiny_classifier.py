"""A tiny classifier of random weights, and its evaluation."""

import json
from importlib import resources
from pathlib import Path

import torch
from tiny_runs import SIZE, as_flags

import modeling_finetune

MODEL = "beit_demo_patch16_128"


def timms_table(name):
    return (resources.files("timm.data") / "_info" / f"{name}.txt").read_text().split()


def classifier(classes: int, path: Path, **kwargs) -> modeling_finetune.VisionTransformer:
    """Random weights whose answers vary from image to image."""
    torch.manual_seed(3)
    shape = dict(
        img_size=32, num_classes=classes, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True
    )
    model = modeling_finetune.create_model(MODEL, **(shape | kwargs), init_scale=1.0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    torch.save({"model": model.state_dict()}, path)
    return model.eval()


def eval_flags(images: Path, out: Path, *more: str) -> list[str]:
    flags = as_flags(eval=True, eval_data_path=images, output_dir=out, model=MODEL, batch_size=32)
    return [*flags, *SIZE[:-2], *more]


def results(out: Path) -> dict:
    return json.loads((out / "eval.json").read_text())
