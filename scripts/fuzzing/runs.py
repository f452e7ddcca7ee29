"""What a case of scripts/fuzz.py is, and tiny valid runs of the entry scripts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import tiny_runs

CANARY = "canary"  # a file that only code in a hostile file would write
SECRET = "S3CR3TSIGNATURE"
ENTRIES = (
    "run_vqkd_training",
    "run_beitv2_pretraining",
    "run_class_finetuning",
    "run_segmentation_finetuning",
    "run_linear_eval",
    "encode_images",
    "export_checkpoint",
    "visualize_attention",
    "visualize_codebook",
)
ONE_EPOCH = ("--epochs", "1", "--warmup_epochs", "0")


@dataclass
class Case:
    """One run. With status 0 the output must name one of `named` where `must_name`;
    `check` gives a complaint or None.
    """

    kind: str
    what: str
    entry: str
    argv: list[Any]
    must_fail: bool = False
    must_name: bool = False
    named: tuple[str, ...] = ()
    check: Callable[[Path], str | None] | None = None


def shared_files(folder: Path) -> Path:
    """Data and weights that the cases copy from."""
    photos = tiny_runs.photos(folder / "photos")
    tiny_runs.labeled_pixels(folder / "pairs")
    tiny_runs.tokenizer(folder / "tokenizer.pth")
    tiny_runs.student(folder / "student.pth")
    import_module("make_shards").main(
        [str(photos), str(folder / "shards"), "--images_per_shard", "5", "--classes"]
    )
    run_quietly("run_class_finetuning", tiny_runs.finetuning_flags(photos, folder / "classifier", *ONE_EPOCH))
    run_quietly("run_segmentation_finetuning", segmentation(folder, folder / "segmenter"))
    run_quietly("encode_images", encoding(folder, folder / "encoded"))
    return folder


def run_quietly(entry: str, argv: list[Any]) -> None:
    """In a process of its own: a run leaves handlers and settings behind."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            import_module(entry).main([str(word) for word in argv])
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(process, 0)[1]:
        raise SystemExit(f"the valid run of {entry} failed")


def segmentation(data: Path, out: Path) -> list[Any]:
    return tiny_runs.segmentation_flags(data / "pairs", out, "--max_steps", "2", "--steps_per_epoch", "2")


def encoding(data: Path, out: Path) -> list[Any]:
    files = tiny_runs.as_flags(
        tokenizer_weight=data / "tokenizer.pth", data_path=data / "photos", output_dir=out
    )
    return [*files, *tiny_runs.as_flags(device="cpu", num_workers=0, batch_size=4)]


def linear_eval(photos: Path, weights: Path, out: Path) -> list[Any]:
    data = tiny_runs.as_flags(
        data_set="image_folder", data_path=photos, eval_data_path=photos, output_dir=out, finetune=weights
    )
    return [*data, *tiny_runs.SIZE, *tiny_runs.as_flags(batch_size=4, epochs=1, knn_k=1)]


def valid_runs(shared: Path, out: Path) -> dict[str, list[Any]]:
    """Flags with which each entry runs in a second or two."""
    photos, tokenizer, student = shared / "photos", shared / "tokenizer.pth", shared / "student.pth"
    picture = ["--image", photos / "a", "--count", "2", "--device", "cpu"]
    return {
        "run_vqkd_training": tiny_runs.vqkd_flags(photos, out, *ONE_EPOCH),
        "run_beitv2_pretraining": tiny_runs.pretraining_flags(photos, out, tokenizer, *ONE_EPOCH),
        "run_class_finetuning": tiny_runs.finetuning_flags(photos, out, *ONE_EPOCH),
        "run_segmentation_finetuning": segmentation(shared, out),
        "run_linear_eval": linear_eval(photos, student, out),
        "encode_images": encoding(shared, out),
        "export_checkpoint": tiny_runs.as_flags(
            checkpoint=student, to="safetensors", output=out / "x.safetensors"
        ),
        "visualize_attention": ["--checkpoint", student, "--output", out / "x.png", *picture],
        "visualize_codebook": ["--encoded", shared / "encoded", "--output", out / "x.html"],
    }


def fake_programs(folder: Path) -> Path:
    """A folder for PATH: programs that image libraries are known to call, which leave
    the canary.
    """
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("gs", "gswin64c", "inkscape", "convert", "magick", "dot", "xv", "display"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {folder / CANARY}\nexit 1\n")
        (programs / name).chmod(0o755)
    return programs
