"""How far estimate.py's peak of memory is from what a real step allocates, on this CPU:

python scripts/measure_estimate.py --output FILE

Each step is taken twice: by the estimate, on tensors without data, and for real, with
torch.profiler writing down every allocation. docs/lab/estimate.md has the table.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import arguments
import engine
import estimate
import modeling_vqkd
from estimation.measurement import pretended_run
from runtime.terminal import silence

MIB = 2**20
MEASURED = "the measured step"
STAGES = {  # size -> flags
    "run_beitv2_pretraining.py": {
        "demo": "--model beit_demo_patch16_128_8k_vocab_cls_pt --input_size 128 --early_layers 4 "
        "--tokenizer_model vqkd_encoder_demo_decoder_1x128x4_hog --codebook_size 1024 --batch_size 64",
        "tiny": "--model beit_tiny_patch16_224_8k_vocab_cls_pt --early_layers 9 --codebook_size 1024 "
        "--tokenizer_model vqkd_encoder_tiny_decoder_1x192x3_clip --batch_size 16",
    },
    "run_vqkd_training.py": {
        "demo": "--model vqkd_encoder_demo_decoder_1x128x4_hog --input_size 128 --teacher_input_size 128 "
        "--codebook_n_emd 1024 --batch_size 64",
        "tiny": "--model vqkd_encoder_tiny_decoder_1x192x3_clip --teacher_model_type hog "
        "--codebook_n_emd 1024 --batch_size 16",
    },
    "run_class_finetuning.py": {
        "demo": "--model beit_demo_patch16_128 --input_size 128 --batch_size 64 --drop_path 0.1 "
        "--nb_classes 2",
        "tiny": "--model beit_tiny_patch16_224 --batch_size 16 --drop_path 0.1 --nb_classes 2",
    },
}


class Row(NamedTuple):
    stage: str
    size: str
    dtype: str
    checkpointing: bool
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def write_photos(folder: Path, count: int = 64) -> None:
    """Noise in two classes."""
    for number in range(count):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (160, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[number % 2] / f"{number}.png")


def write_tokenizer(args: argparse.Namespace, path: Path) -> None:
    tokenizer = modeling_vqkd.create_model(
        args.tokenizer_model, as_tokenizer=True, n_code=args.codebook_size, img_size=args.input_size
    )
    torch.save({"model": tokenizer.state_dict()}, path)


def allocated(events: Sequence[Any]) -> int:
    """The most bytes at once in the measured step, from a profile that began before
    anything was allocated.
    """
    marks = [event for event in events if event.name() == MEASURED]
    begin = marks[0].start_ns()
    end = begin + marks[0].duration_ns()
    total = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        if begin <= event.start_ns() <= end:
            most = max(most, total)
    return most


def measure(entry: Any, args: Any) -> int:
    """Bytes at the peak of the third step of a real run."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = entry.module.build(args)
        state, stage, transform = trainer.state, trainer.stage, trainer.data.loader.dataset.device_transform
        state.runner.train()
        stage.start_epoch(0)
        for step in range(3):
            micro_batches = [next(iter(trainer.data.loader))]
            stage.before_step(step)
            with record_function(MEASURED if step == 2 else "another step"):
                engine.accumulate_gradients(state, stage, micro_batches, trainer.run, transform)
                engine.take_step(state, trainer.run.options.clip_grad)
            state.step += 1
    return allocated(profiler.profiler.kineto_results.events())


def compare(folder: Path, names: Sequence[str], sizes: Sequence[str]) -> Iterator[Row]:
    write_photos(folder / "photos")
    for script in names:
        entry = estimate.ENTRIES[script]
        for size, dtype, checkpointing in itertools.product(sizes, ("fp32", "bf16"), (False, True)):
            words = [*STAGES[script][size].split(), "--data_path", str(folder / "photos"), "--device", "cpu"]
            words += ["--num_workers", "0", "--amp_dtype", dtype]
            words += ["--grad_checkpointing"] if checkpointing else []
            args = entry.module.parse_flags(words)
            with silence(logging.WARNING), pretended_run(entry, args, 64, None, 1) as run:
                predicted = run.measure().peak
            if hasattr(args, "tokenizer_model"):
                write_tokenizer(args, folder / "tokenizer.pth")
                args = args.replace(tokenizer_weight=str(folder / "tokenizer.pth"))
            if hasattr(args, "disable_eval_during_finetuning"):
                args = args.replace(disable_eval_during_finetuning=True, data_set="image_folder")
            with silence(logging.WARNING):
                yield Row(script, size, dtype, checkpointing, predicted, measure(entry, args))


def format_row(row: Row) -> str:
    stage = row.stage.removeprefix("run_").removesuffix(".py")
    kept = "checkpointing" if row.checkpointing else "plain"
    off = f"{row.error:+.1%}"
    off = "0.0%" if off[1:] == "0.0%" else off  # which has no sign
    return (
        f"| {stage} | {row.size} | {row.dtype} | {kept} | {row.predicted / MIB:.1f} | "
        f"{row.measured / MIB:.1f} | {off} |"
    )


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("How far estimate.py is from real steps", "--output FILE")
    parser.add_argument(
        "--stages", nargs="+", default=list(STAGES), choices=list(STAGES), help="what is trained"
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["demo", "tiny"], choices=["demo", "tiny"], help="of the models"
    )
    parser.add_argument(
        "--output", type=arguments.expand_home, default="", help="file for the table, as Markdown"
    )
    return parser


def main() -> None:
    args = arguments.parse(get_parser())
    random.seed(0)
    lines = [
        "| stage | size | precision | blocks | estimated, MiB | allocated, MiB | off |",
        "|" + " --- |" * 7,
    ]
    rows = []
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        for row in compare(Path(folder), args.stages, args.sizes):
            rows.append(row)
            lines.append(format_row(row))
            print(lines[-1], flush=True)
    print(f"worst: {max(rows, key=lambda row: abs(row.error)).error:+.1%}")
    if args.output:
        Path(args.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
