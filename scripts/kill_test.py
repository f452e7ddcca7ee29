"""Kill training runs with -9 at random moments, start each again by the same line, and
compare its end with an undisturbed run.

    python scripts/kill_test.py [--kills 100] [--seed 0] [--stages vqkd finetune ...]

Every stage, on tiny models, with --update_freq 2: once on images in folders, read by
the run itself, and once on tar shards, read by two data workers (segmentation: on
folders both times). Among them: k-means and revival of dead codes, a moving average of
the weights, mixup, dropped paths. A run is killed again and again until it ends between
two kills; its end is then compared bit for bit: all that is in its checkpoints
(weights, moments, averages, ...) and each line of log.txt but the seconds. Prints
counts for each stage, and every difference.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked processes cannot share a pool of threads
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import tiny_runs  # noqa: E402
import torch  # noqa: E402

import arguments  # noqa: E402
import make_shards  # noqa: E402
from errors import ArgumentParser  # noqa: E402

FORK = multiprocessing.get_context("fork")  # torch is imported once, by this process
TIME_LIMIT = 300.0  # seconds of a run
OUT, OUTPUT = "out", "output.txt"
STAGES = ("vqkd", "pretrain", "finetune", "linear", "pixels", "segment")


@dataclass(frozen=True)
class Case:
    """A stage's script and flags. Runs differ in the folder that they start in, in no
    flag.
    """

    stage: str
    data: str
    script: str
    flags: list[str]


def build_cases(folder: Path) -> list[Case]:
    folders = (
        tiny_runs.photos(folder / "photos", per_class=12),
        tiny_runs.photos(folder / "held-out", per_class=2),
    )
    shards = pack(folders[0], folder / "shards"), pack(folders[1], folder / "held-out-shards")
    codes, student = tiny_runs.tokenizer(folder / "codes.pth"), tiny_runs.student(folder / "student.pth")
    pairs, out = tiny_runs.labeled_pixels(folder / "pairs", images=12), Path(OUT)
    common = ["--update_freq", "2", "--save_ckpt_steps", "2", "--keep_ckpts", "2", "--save_ckpt_freq", "2"]
    dropped = ["--drop_path", "0.1"]
    revived = ["--quantizer_warmup_steps", "1", "--revive_dead_codes"]
    averaged = ["--model_ema", "--model_ema_decay", "0.9", "--mixup", "0.8", "--cutmix", "1.0", *dropped]
    pixels = ["--train_pixel_decoder", "--tokenizer_weight", str(codes), "--pixel_decoder_dim", "32"]
    steps = ["--max_steps", "11", "--steps_per_epoch", "3"]  # the last epoch is cut
    cases = []
    for name, (data, held_out), workers in (("image_folder", folders, "0"), ("webdataset", shards, "2")):
        reading = [*common, "--num_workers", workers]
        seen = ["--data_set", name, "--eval_data_path", str(held_out), *reading, "--epochs", "5"]
        plain = ["--data_path", str(data), "--output_dir", OUT, "--batch_size", "4", *tiny_runs.SIZE]
        cases += [
            Case("vqkd", name, "run_vqkd_training", [*tiny_runs.vqkd_flags(data, out), *revived, *seen]),
            Case(
                "pretrain",
                name,
                "run_beitv2_pretraining",
                [*tiny_runs.pretraining_flags(data, out, codes), *dropped, *seen],
            ),
            Case(
                "finetune",
                name,
                "run_class_finetuning",
                [*tiny_runs.finetuning_flags(data, out), *averaged, *seen],
            ),
            Case("linear", name, "run_linear_eval", [*plain, "--finetune", str(student), *seen]),
            Case("pixels", name, "run_vqkd_training", [*plain, *pixels, *seen]),
            Case(
                "segment",
                f"pairs, {workers} workers",
                "run_segmentation_finetuning",
                [*tiny_runs.segmentation_flags(pairs, out), *dropped, *steps, *reading],
            ),
        ]
    return cases


def pack(images: Path, folder: Path) -> Path:
    """Shards of labeled images, made by a process of its own: tqdm leaves a thread in
    it, and this one is to be forked.
    """
    flags = [str(images), str(folder), "--images_per_shard", "3", "--classes"]
    with contextlib.redirect_stdout(io.StringIO()):
        process = FORK.Process(target=make_shards.main, args=(flags,))
        process.start()
        process.join()
    return folder


def run_line(case: Case, folder: Path) -> None:
    """In a process of its own: the entry script, as if started in `folder`."""
    os.setsid()
    file = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    importlib.import_module(case.script).main(case.flags)


def start(case: Case, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    process = FORK.Process(target=run_line, args=(case, folder))
    process.start()
    return process


def kill_again_and_again(
    case: Case, folder: Path, whole: Path, seconds: float, kills: int, draw: random.Random
) -> int:
    """How many of the kills were followed by the end of the undisturbed run
    `whole`, which took `seconds`.
    """
    done = pending = equal = 0
    while done < kills or pending:
        process, kill = start(case, folder), done < kills
        process.join(draw.uniform(0, seconds) if kill else TIME_LIMIT)
        ended = not process.is_alive()
        process.kill()  # the process alone: its data workers find out by themselves
        process.join()
        if kill and not ended:
            done, pending = done + 1, pending + 1
            continue
        failed = [] if process.exitcode == 0 else [f"status {process.exitcode}: {last_words(folder)}"]
        differences = failed or compare(whole / OUT, folder / OUT)
        for text in differences[:5]:
            print(f"{case.stage}, {case.data}, after {pending} kills: {text}", flush=True)
        equal, pending = equal + (0 if differences else pending), 0
        shutil.rmtree(folder)
    return equal


def last_words(folder: Path) -> str:
    return (folder / OUTPUT).read_text(errors="replace")[-2000:]


def compare(whole: Path, other: Path) -> list[str]:
    """What differs between two output folders, in words."""
    differences = []
    lines = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in tiny_runs.log_lines(f)]
        for f in (whole, other)
    ]
    if json.dumps(lines[0]) != json.dumps(lines[1]):
        keys = sorted(
            {
                key
                for one, two in zip(*lines, strict=False)
                for key in one | two
                if one.get(key) != two.get(key)
            }
        )
        differences.append(f"log.txt: {len(lines[1])} lines instead of {len(lines[0])}, different in {keys}")
    names = [sorted(path.name for path in folder.glob("checkpoint*.pth")) for folder in (whole, other)]
    differences += [] if names[0] == names[1] else [f"checkpoints {names[1]} instead of {names[0]}"]
    for name in sorted(set(names[0]) & set(names[1])):
        one, two = (dict(leaves(tiny_runs.checkpoint(folder / name))) for folder in (whole, other))
        keys = [key for key in one | two if key not in one or key not in two or not same(one[key], two[key])]
        differences += [f"{name}: {len(keys)} of {len(one)} entries differ, first {keys[:3]}"] if keys else []
    return differences


def leaves(content: Any, name: str = "") -> Any:
    """Every tensor, number and text in nested dictionaries and lists, with its keys."""
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, (list, tuple))
        else None
    )
    if items is None:
        yield name, content
    for key, value in items or ():
        yield from leaves(value, f"{name}.{key}")


def same(one: Any, two: Any) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)):
        return type(one) is type(two) and one == two
    alike = one.dtype == two.dtype and one.shape == two.shape
    return alike and torch.equal(
        one.contiguous().flatten().view(torch.uint8), two.contiguous().flatten().view(torch.uint8)
    )


def get_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills",
        type=arguments.positive,
        default=100,
        help="how many, over all stages (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, help="of the moments (default: %(default)s)"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    return parser


def main() -> int:
    args = get_parser().parse_args()
    torch.set_num_threads(1)
    draw, kills, equal, began = random.Random(args.seed), 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [case for case in build_cases(folder) if case.stage in args.stages]
        for script in {case.script for case in cases}:
            importlib.import_module(script)
        for number, case in enumerate(cases):
            share = args.kills // len(cases) + (number < args.kills % len(cases))
            if not share:
                continue
            started, whole = time.monotonic(), folder / f"whole-{number}"
            process = start(case, whole)
            process.join(TIME_LIMIT)
            if process.exitcode != 0:
                raise SystemExit(
                    f"the undisturbed run failed (status {process.exitcode}):\n{last_words(whole)}"
                )
            seconds = time.monotonic() - started
            good = kill_again_and_again(case, folder / f"killed-{number}", whole, seconds, share, draw)
            print(
                f"{case.stage:<9} {case.data}: {good} of {share} kills, a run of {seconds:.1f} s", flush=True
            )
            kills, equal = kills + share, equal + good
    print(
        f"{equal} of {kills} kills were followed by the end of the undisturbed run, in "
        f"{time.monotonic() - began:.0f} s"
    )
    return 0 if equal == kills else 1


if __name__ == "__main__":
    raise SystemExit(main())
