"""A run of a few steps of every stage of the one training loop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_runs import (
    SIZE,
    as_flags,
    finetuning_flags,
    labeled_pixels,
    pretraining_flags,
    segmentation_flags,
    student,
    vqkd_flags,
)

import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_segmentation_finetuning
import run_vqkd_training

STAGES = ("vqkd", "pretraining", "finetuning", "segmentation", "linear probe", "pixel decoder")


def pixel_decoder_flags(data, out, tokenizer_weight, *more):
    flags = as_flags(data_path=data, train_pixel_decoder=True, tokenizer_weight=tokenizer_weight)
    flags += as_flags(output_dir=out, pixel_decoder_dim=32, batch_size=4, epochs=2, lr=1e-3)
    return [*flags, *SIZE, *more]


def linear_flags(data, out, weights, *more):
    flags = as_flags(data_set="image_folder", data_path=data, eval_data_path=data, output_dir=out)
    return [*flags, *SIZE, *as_flags(finetune=weights, batch_size=4, epochs=2, lr=0.1), *more]


def all_stages(data: Path, tokenizer_weight: Path, folder: Path) -> dict[str, tuple[Callable, Callable]]:
    """Name -> (main, its flags for an output folder): 8 steps of 4 images, but 6 of 2.
    `folder`: for what they need.
    """
    weights, pairs = student(folder / "student.pth"), labeled_pixels(folder / "pairs")
    return {
        "vqkd": (run_vqkd_training.main, lambda out, *more: vqkd_flags(data, out, *more)),
        "pretraining": (
            run_beitv2_pretraining.main,
            lambda out, *more: pretraining_flags(data, out, tokenizer_weight, *more),
        ),
        "finetuning": (run_class_finetuning.main, lambda out, *more: finetuning_flags(data, out, *more)),
        "segmentation": (
            run_segmentation_finetuning.main,
            lambda out, *more: segmentation_flags(pairs, out, *more),
        ),
        "linear probe": (run_linear_eval.main, lambda out, *more: linear_flags(data, out, weights, *more)),
        "pixel decoder": (
            run_vqkd_training.main,
            lambda out, *more: pixel_decoder_flags(data, out, tokenizer_weight, *more),
        ),
    }


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def metrics(out: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, as a strict reader takes them."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]
