"""What a training run will need, before it is started (docs/estimate.md):

python estimate.py run_beitv2_pretraining.py --model ... --batch_size 128 --gpus 16 --gpu V100-32GB

The run is built by its own script, and takes a step on tensors that hold no data: no
GPU, no images and no weights are needed.
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arguments
import run_beitv2_pretraining
import run_class_finetuning
import run_segmentation_finetuning
import run_vqkd_training
from checkpoint_io import checkpoints
from checkpoint_io.downloads import explain_cut_url, is_cut_url
from errors import UserError, pick, report_user_errors
from estimation import report
from estimation.measurement import Measured, pretended_run
from estimation.report import MIB, Row, Setting
from estimation.stand_ins import (
    Entry,
    parts_of_finetuning,
    parts_of_pretraining,
    parts_of_segmentation,
    parts_of_vqkd,
)
from runtime.cards import CARDS, find_card
from runtime.terminal import log, set_up_logging, silence

ENTRIES = {
    "run_beitv2_pretraining.py": Entry(
        run_beitv2_pretraining, 1281167, True, parts_of_pretraining, lambda stage: stage.target.networks()
    ),
    "run_vqkd_training.py": Entry(
        run_vqkd_training, 1281167, True, parts_of_vqkd, lambda stage: [stage.teacher]
    ),
    "run_class_finetuning.py": Entry(run_class_finetuning, 1281167, False, parts_of_finetuning),
    "run_segmentation_finetuning.py": Entry(run_segmentation_finetuning, 20210, False, parts_of_segmentation),
}
PUBLISHED_CARD = "V100-32GB"  # of the published recipes


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser(
        "What a training run will need",
        "run_beitv2_pretraining.py --model beit_base_patch16_224_8k_vocab_cls_pt --batch_size 128\n"
        "--gpus 8 --gpu A100-80GB --price 2.5",
    )
    add = parser.add_argument
    add(
        "command",
        help=f"{', '.join(ENTRIES)}, followed by its flags; a launcher may stand before it, with the number "
        "of processes. --data_path and files of weights need not be there",
    )
    add("--gpus", type=arguments.Number(int, 1, 2**14), default=None, help="default: the launcher's, else 1")
    add("--gpu", default=PUBLISHED_CARD, help=f"{', '.join(CARDS)}; default: {PUBLISHED_CARD}")
    add(
        "--images",
        type=arguments.positive,
        default=None,
        help="images to train on; default: those of ImageNet-1k (segmentation: of ADE20K)",
    )
    add(
        "--price",
        type=arguments.not_negative_number,
        default=None,
        help="of an hour of one GPU, in any currency",
    )
    add(
        "--mfu",
        type=arguments.fraction,
        default=None,
        help="share of the card's peak that a step reaches; the default is an assumption",
    )
    add("--output", type=arguments.expand_home, default="", help="also write all of it to this JSON file")
    return parser


def parse(argv: Sequence[str] | None) -> tuple[arguments.Flags, list[str], list[str]]:
    """Our flags, the words of a launcher before the script's name, and those after it."""
    words = arguments.words_of(argv)
    at = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        if not {"-h", "--help"} & set(words):
            raise UserError(f"which run? Name its script and its flags: {', '.join(ENTRIES)}")
        at = len(words)
    script = words[at : at + 1]
    before, launcher = take_own(script, words[:at])
    if script and launcher and launcher[0].startswith("-") and launcher[0] != "-m":  # as `python -m`
        raise UserError(f"{launcher[0]} stands before {script[0]}: write the flags of a run after its script")
    after, theirs = take_own(script, words[at + 1 :])
    return arguments.parse(get_parser(), [*script, *before, *after]), launcher, theirs


def take_own(script: list[str], words: list[str]) -> tuple[list[str], list[str]]:
    """The words of our own flags, and the others; --config is a flag of the script."""
    known, others = get_parser().parse_known_args([*script, *words])
    own, left = [], list(others)
    for word in words:
        if left and word == left[0]:
            left.pop(0)
        else:
            own.append(word)
    if hasattr(known, "config"):
        at = next(index for index, word in enumerate(own) if word.split("=")[0] == "--config")
        length = 1 if "=" in own[at] else 2
        others += own[at : at + length]
        del own[at : at + length]
    return own, others


def count_processes(launcher: Sequence[str]) -> int:
    """As the words before the script say: torchrun's and torch.distributed.launch's."""
    programs = [word for word in launcher if "=" not in word]  # not the variables before it
    if programs and not re.match(r"(python|torchrun)[\d.]*$|-m$", Path(programs[0]).name):
        raise UserError(f"how many processes {programs[0]} starts is not known here: give `gpus`")
    line = " ".join(launcher).replace("-", "_")
    found = [re.search(rf"__{name}[= ](\S+)", line) for name in ("nnodes", "nproc_per_node")]
    numbers = [int(match[1]) if match and match[1].isdigit() else 1 for match in found]
    if any(match and not match[1].isdigit() for match in found):
        raise UserError("the launcher does not say a number of processes: give `gpus`")
    return numbers[0] * numbers[1]


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    own, launcher, words = parse(argv)
    set_up_logging(0)
    name = Path(own.command).name
    entry, card = pick(ENTRIES, name, "training script"), find_card(own.gpu)
    if own.output and not Path(own.output).parent.is_dir():  # told before the half minute
        raise UserError(f"`output` {own.output}: there is no such folder, make it or name another")
    args, gpus = entry.parse(words), own.gpus or count_processes(launcher)
    if is_cut_url(str(getattr(args, "tokenizer_weight", ""))):
        log.warning("warning: " + explain_cut_url("the URL of `tokenizer_weight`"))
    if args.amp_dtype == "auto":
        args = args.replace(amp_dtype=card.dtype)
    setting = Setting.of(card, gpus, args.amp_dtype, own.mfu, own.price)
    count = own.images or entry.images
    with silence(), pretended_run(entry, args, count, card, gpus) as run:
        step = run.measure()
        largest = report.find_largest_batch(run, card, step)
    rows = [Row("as given", step), *measure_others(entry, args, count, setting)]
    print("\n".join(describe(name, entry, args, setting, step, largest)))
    print("\nWith other flags:\n" + "\n".join(report.format_rows(setting, rows)))
    if own.output:
        file = Path(own.output)
        content = json.dumps(as_json(entry, args, setting, step, largest, rows), indent=1) + "\n"
        checkpoints.write_text(str(file.parent), file.name, content)
        print(f"\nwritten    {own.output}")


def measure_others(entry: Entry, args: arguments.Flags, count: int, setting: Setting) -> list[Row]:
    """The same run with each flag that trades memory for time turned over."""
    changes: list[tuple[str, dict[str, Any]]] = []
    for name in ("grad_checkpointing", "fsdp"):
        if hasattr(args, name) and (name != "fsdp" or setting.gpus > 1):
            on = getattr(args, name)
            changes.append((f"without --{name}" if on else f"--{name}", {name: not on}))
    if len(changes) == 2 and not (args.grad_checkpointing or args.fsdp):
        changes.append(("--grad_checkpointing --fsdp", {"grad_checkpointing": True, "fsdp": True}))
    if args.batch_size >= 4:
        half, twice = args.batch_size // 2, args.update_freq * 2
        flags = f"--batch_size {half} --update_freq {twice}"
        changes.append((flags, {"batch_size": half, "update_freq": twice}))
    rows = []
    for flags, change in changes:
        with silence(logging.WARNING):
            try:
                with pretended_run(entry, args.replace(**change), count, setting.card, setting.gpus) as run:
                    rows.append(Row(flags, run.measure()))
            except UserError:  # flags that do not go together
                continue
    return rows


def describe(
    name: str, entry: Entry, args: arguments.Flags, setting: Setting, step: Measured, largest: int
) -> list[str]:
    card, gpus = setting.card, setting.gpus
    speed, hours = setting.images_per_second(step), setting.hours(step)
    cores = report.data_cores(entry, args, speed)
    lines = [
        f"run        {name} on {gpus} x {card.name}, {setting.dtype}, {step.images} images a step",
        f"model      {step.parameters / 1e6:.1f} M parameters learn",
        *report.format_memory(card, step),
        f"           the largest --batch_size that fits: {largest or 'none'}",
        f"compute    {report.gflop_per_image(setting, step):.1f} GFLOP an image",
        f"exchange   {step.exchanged / MIB:.0f} MiB a GPU and step",
        f"time       {speed:,.0f} images/s, {hours:,.1f} hours for {step.steps:,} steps, at "
        f"{setting.mfu:.0%} of {card.peak_flops(setting.dtype) / 1e12:.0f} TFLOP/s",
        "           (--mfu: a share that is assumed, not measured: no run has been timed on a GPU)",
        "data       cores for reading images: not measured for this stage and these images"
        if cores is None
        else f"data       {cores:,.1f} cores are busy reading images, {cores / gpus:.1f} for each GPU",
        report.format_disk(args, step),
    ]
    if setting.price is not None:
        total = setting.price * gpus * hours
        lines.append(f"price      {total:,.0f} = {gpus} x {hours:,.1f} hours x {setting.price:g}")
    return lines


def as_json(
    entry: Entry, args: arguments.Flags, setting: Setting, step: Measured, largest: int, rows: list[Row]
) -> dict[str, Any]:
    def figures(step: Measured) -> dict[str, Any]:
        speed, hours = setting.images_per_second(step), setting.hours(step)
        return {
            "parameters": step.parameters,
            "peak_bytes": step.peak,
            "peak_by_kind": step.by_kind,
            "fits": setting.card.holds(step.peak),
            "gflop_per_image": report.gflop_per_image(setting, step),
            "exchanged_bytes_per_step": step.exchanged,
            "images_per_second": speed,
            "hours": hours,
            "price": None if setting.price is None else setting.price * setting.gpus * hours,
        }

    return {
        "gpu": setting.card.name,
        "gpus": setting.gpus,
        "amp_dtype": setting.dtype,
        "mfu": setting.mfu,
        **figures(step),
        "largest_batch_size": largest,
        "images_per_step": step.images,
        "steps": step.steps,
        "data_cores": report.data_cores(entry, args, setting.images_per_second(step)),
        "disk_bytes": report.disk_bytes(args, step),
        "others": [{"flags": row.flags, **figures(row.step)} for row in rows[1:]],
    }


if __name__ == "__main__":
    main()
