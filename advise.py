"""Look at a folder of images and say how to train on it: python advise.py my_images

It prints what is in the folder, three command lines (tokenizer, pretraining,
fine-tuning) with a reason for each choice, and how long they will take on this machine,
from half a minute of trying them out. docs/advice.md says how it chooses.
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import dataclasses
import json
import logging
import shlex
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import arguments
import engine
import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
from advice.command import Command, Machine
from advice.description import describe
from advice.inspection import FolderReport, inspect_folder, make_split
from advice.plan import make_plan
from checkpoint_io import checkpoints
from errors import printable, report_user_errors
from runtime.terminal import format_clock, set_up_logging, silence
from visualization.inputs import prepare_output

ENTRIES: dict[str, Any] = {
    "vqkd": run_vqkd_training,
    "pretrain": run_beitv2_pretraining,
    "finetune": run_class_finetuning,
}
TITLES = {"vqkd": "1. Tokenizer", "pretrain": "2. Pretraining", "finetune": "3. Fine-tuning"}
PROBE_SECONDS = 8.0  # a stage
FEW = 600  # images
WARM_UP_STEPS = 2


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("How to train on a folder of images", "my_images --output plan.json")
    parser.add_argument(
        "folder",
        type=arguments.expand_home,
        help="images, however nested; with one folder per class, fine-tuning too; train/ and val/ are splits",
    )
    parser.add_argument(
        "--output", type=arguments.expand_home, default="", help="also write the plan to this JSON file"
    )
    parser.add_argument(
        "--output_dir",
        type=arguments.expand_home,
        default="out",
        help="where the suggested commands write their output",
    )
    parser.add_argument(
        "--make_split",
        action="store_true",
        help="of a folder with classes, link every fifth image into OUTPUT_DIR/split/val and the rest into "
        "split/train, copies left out",
    )
    parser.add_argument("--no_probe", action="store_true", help="do not try the command lines out")
    parser.add_argument("--device", default="cuda", help="cuda (the CPU if there is none) or cpu")
    parser.add_argument(
        "--num_workers", type=arguments.not_negative, default=10, help="data processes; capped at the cores"
    )
    return parser


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    set_up_logging(0)
    idle = {"num_workers": "--no_probe tries nothing out"} if args.no_probe else {}
    arguments.warn_of_idle_flags(get_parser(), args, idle)
    if args.output:
        prepare_output(args.output, (Path(args.output).suffix.lower(),), "--output")  # any ending
    folder = inspect_folder(args.folder)
    if args.make_split:
        root = Path(args.output_dir, "split")
        make_split(folder.root, root)
        folder = inspect_folder(str(root))
    print("\n".join(describe(folder)))
    machine = Machine.here(args.device)
    plan = make_plan(folder, machine, args.output_dir)
    seconds: dict[str, float] = {}
    if not args.no_probe:
        print(f"\nTrying the stages out for {PROBE_SECONDS:.0f} seconds each ...", flush=True)
        seconds = probe(plan, folder, args)
    launcher = "python" if machine.gpus < 2 else f"torchrun --nproc_per_node={machine.gpus}"
    for command in plan:
        print("\n" + "\n".join(explain(command, launcher, seconds.get(command.stage))))
    print("\n" + "\n".join(advise_further(folder, machine, args.output_dir)))
    if args.output:
        write_plan(args.output, folder, machine, plan, launcher, seconds)
        print(f"written    {args.output}")


# ── What it says ──


def explain(command: Command, launcher: str, seconds: float | None) -> list[str]:
    """The command line, its time, and a line for each flag that has a reason."""
    title = f"── {TITLES[command.stage]}: {command.steps:,} steps"
    if seconds is not None:
        title += f", about {format_clock(seconds * command.steps)} on this machine"
    lines = [title + " ──", command.line(launcher), ""]
    width = max(len(" ".join(flag.words)) for flag in command.flags if flag.why)
    for flag in command.flags:
        if flag.why:
            lines.append(f"  {' '.join(flag.words):<{width}}  {flag.why}")
    return lines


def advise_further(folder: FolderReport, machine: Machine, output_dir: str) -> list[str]:
    notes = []
    if folder.is_labeled and not folder.has_splits:
        notes.append(
            "Fine-tuning needs images to validate on, and there is no val/: the same line with --make_split "
            f"links every fifth image into {output_dir}/split/val, and the plan then uses these."
        )
    if not folder.is_labeled:
        notes.append(
            "Without labels, the pretrained model gives features: python extract_features.py "
            f"{shlex.join([f'{output_dir}/pretrain/checkpoint.pth', folder.root])} --output features.npy"
        )
    if folder.images < FEW:
        notes.append(
            f"Few images ({folder.images:,}): pretraining from random weights gained nothing on 377 photos "
            "(docs/lab/advice.md). Start from published weights, which are of base and larger models "
            "(--init_from, docs/continuing.md), or add unlabeled images of the same kind."
        )
    if not machine.gpus:
        notes.append(
            "This is a try-out on a CPU. On a machine with a GPU, the same command advises a real model."
        )
    notes.append("Many more steps than these help only while masked accuracy (log.txt) still rises.")
    return [
        line
        for note in notes
        for line in textwrap.wrap(
            printable(note),
            100,
            break_on_hyphens=False,
            initial_indent="note       ",
            subsequent_indent="           ",
        )
    ]


def write_plan(
    path: str,
    folder: FolderReport,
    machine: Machine,
    plan: Sequence[Command],
    launcher: str,
    seconds: dict[str, float],
) -> None:
    content = {
        "folder": dataclasses.asdict(folder),
        "machine": dataclasses.asdict(machine),
        "commands": [
            {
                "stage": command.stage,
                "line": [*launcher.split(), command.script, *command.words()],
                "flags": {flag.name: flag.words[1:] for flag in command.flags},
                "reasons": {flag.name: flag.why for flag in command.flags if flag.why},
                "steps": command.steps,
                "seconds": None
                if command.stage not in seconds
                else round(seconds[command.stage] * command.steps),
            }
            for command in plan
        ],
    }
    file = Path(path)
    checkpoints.write_text(str(file.parent), file.name, json.dumps(content, indent=1) + "\n")


# ── How long it takes ──


def probe(plan: Sequence[Command], folder: FolderReport, args: argparse.Namespace) -> dict[str, float]:
    """Seconds a step of each stage, on this machine and these images, reading included.
    The tokenizer that pretraining uses is an untrained one.
    """
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for command in plan:
            if command.stage == "finetune" and not folder.is_labeled:
                continue
            words = command.words(
                data_path=folder.train,
                eval_data_path=None,
                quantizer_warmup_steps=None,
                finetune=None,
                output_dir=scratch if command.stage == "vqkd" else None,
                tokenizer_weight=Path(scratch, checkpoints.LATEST) if command.stage == "pretrain" else None,
                disable_eval_during_finetuning=True if command.stage == "finetune" else None,
                device=args.device,
                num_workers=args.num_workers,
            )
            with silence(logging.WARNING):
                entry = ENTRIES[command.stage]
                trainer = entry.build(entry.parse_flags(words))
                if command.stage == "vqkd":
                    trainer.save(0, [checkpoints.LATEST])
                    trainer.run.saver.wait()
                seconds[command.stage] = time_steps(trainer)
    return seconds


def time_steps(trainer: engine.Trainer) -> float:
    """Seconds of one step, after the first ones."""
    state, run = trainer.state, trainer.run
    state.runner.train()
    trainer.stage.start_epoch(0)
    trainer.steps_done()
    begin, steps = time.monotonic(), 0
    for number, batch in enumerate(cycle(trainer.data.loader)):
        trainer.stage.before_step(number)
        engine.accumulate_gradients(
            state, trainer.stage, [batch], run, trainer.data.loader.dataset.device_transform
        )
        engine.take_step(state, run.options.clip_grad)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        steps = number + 1 - WARM_UP_STEPS
        if steps <= 0:
            begin = time.monotonic()
        elif time.monotonic() - begin > PROBE_SECONDS:
            break
    return (time.monotonic() - begin) / steps


def cycle(loader: Any) -> Iterator[Any]:
    """Batches of the first epoch, again and again."""
    while True:
        yield from loader


if __name__ == "__main__":
    main()
