"""Kill training runs with -9 at random moments, resume each by the same line, and compare with an undisturbed run, bit for bit.

    python scripts/kill_test.py [--kills 20] [--seed 0]

The kills are spread over the five stages, each with 0 and with 2 data workers, on tiny models: accumulated gradients,
moving averages, tar shards and the revival of dead codes are among them. Compared are all tensors of the last checkpoint
and all of log.txt but the seconds. The runs are forks of this process, which has imported torch once. Prints the count.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

import tiny_runs  # noqa: E402

import checkpointing  # noqa: E402
import make_shards  # noqa: E402

STAGES = ("vqkd", "pretrain", "finetune", "segment", "linear")
OUT = "OUT"  # stands for the output folder
LONGEST_RUN = 300  # seconds


def commands(folder: Path, workers: int) -> dict[str, list[str]]:
    """Script and flags of each stage."""
    data, out = folder / "photos", Path(OUT)
    often = ["--num_workers", str(workers), "--save_ckpt_steps", "2", "--print_freq", "1", "--update_freq", "2"]
    more = [*often, "--epochs", "3"]
    shards = ["--data_set", "webdataset", "--data_path", str(folder / "shards")]
    steps = ["--max_steps", "10", "--steps_per_epoch", "4"]  # the last epoch is cut
    mixed = ["--mixup", "0.8", "--cutmix", "1.0", "--model_ema", "--drop_path", "0.1"]
    revived = ["--quantizer_warmup_steps", "2", "--revive_dead_codes"]
    codes = folder / "tokenizer.pth"
    linear = [flag for flag in tiny_runs.finetuning_flags(data, out) if flag not in ("--layer_decay", "0.8")]
    model = linear.index("--model")
    linear[model : model + 2] = ["--linear", "--finetune", str(folder / "student.pth")]
    return {
        "vqkd": ["run_vqkd_training", *tiny_runs.vqkd_flags(data, out, *revived, *more, "--epochs", "5")],
        "pretrain": [
            "run_beitv2_pretraining",
            *tiny_runs.pretraining_flags(data, out, codes, "--drop_path", "0.1", *more, *shards),
        ],
        "finetune": ["run_class_finetuning", *tiny_runs.finetuning_flags(data, out, *mixed, *more)],
        "segment": ["run_segmentation_finetuning", *tiny_runs.segmentation_flags(folder / "pairs", out, *steps, *often)],
        "linear": ["run_linear_eval", *linear, *more],
    }


def make_data(folder: Path) -> None:
    data = tiny_runs.photos(folder / "photos", per_class=24)
    tiny_runs.tokenizer(folder / "tokenizer.pth")
    tiny_runs.student(folder / "student.pth")
    tiny_runs.labelled_pixels(folder / "pairs", images=16)
    make_shards.main([str(data), str(folder / "shards"), "--images_per_shard", "10"])


def start(command: list[str], out: Path) -> int:
    """The process of a run that has begun; what it prints goes to a file beside `out`."""
    module = importlib.import_module(command[0])
    flags = [str(out) if word == OUT else word for word in command[1:]]
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        printed = os.open(printed_by(out), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        module.main(flags)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def printed_by(out: Path) -> Path:
    return out.with_name(f"{out.name}.txt")


def ended(process: int, out: Path, within: float) -> bool:
    """Whether the run ends by itself in so many seconds; a failure ends this script."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) != 0:
                raise SystemExit(f"a run failed (status {status}):\n{printed_by(out).read_text()[-3000:]}")
            return True
        time.sleep(0.002)
    return False


def finish(command: list[str], out: Path) -> float:
    """A run to its end; its seconds."""
    began = time.monotonic()
    process = start(command, out)
    if not ended(process, out, LONGEST_RUN):
        os.kill(process, signal.SIGKILL)
        raise SystemExit(f"a run did not end in {LONGEST_RUN} s:\n{printed_by(out).read_text()[-3000:]}")
    return time.monotonic() - began


def kill_after(command: list[str], out: Path, seconds: float) -> bool:
    """Start or resume the run and SIGKILL it; False if it ended before."""
    process = start(command, out)
    if ended(process, out, seconds):
        return False
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def differences(one: Path, two: Path) -> list[str]:
    """What the last checkpoints and the logs of two runs do not share."""
    contents = [tiny_runs.checkpoint(out / "checkpoint.pth") for out in (one, two)]
    parts = ("model", "model_ema", "optimizer", "stage", "means")
    tensors = [dict(checkpointing.named_tensors({part: each.get(part) for part in parts})) for each in contents]
    found = [f"tensor {name}" for name in tensors[0].keys() ^ tensors[1].keys()]
    shared = tensors[0].keys() & tensors[1].keys()
    found += [f"tensor {name}" for name in shared if not torch.equal(tensors[0][name], tensors[1][name])]
    found += [f"entry {name}" for name in ("next", "best", "epoch") if contents[0][name] != contents[1][name]]
    lines: list[list[dict[str, Any]]] = [tiny_runs.log_lines(out) for out in (one, two)]
    for line in (*lines[0], *lines[1]):
        del line["seconds"]
    return found + (["log.txt"] if str(lines[0]) != str(lines[1]) else [])  # as text: NaN is NaN


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw, kills, equal, began = random.Random(args.seed), 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        make_data(folder)
        cases = [(stage, workers) for workers in (0, 2) for stage in STAGES]
        for number, (stage, workers) in enumerate(cases):
            share = args.kills // len(cases) + (number < args.kills % len(cases))
            if share == 0:
                continue
            command = commands(folder, workers)[stage]
            whole, broken = folder / f"{stage}-{workers}-whole", folder / f"{stage}-{workers}-broken"
            seconds, here, since, good = finish(command, whole), 0, 0, 0
            while here < share or since:  # kills since the last comparison
                if here < share and kill_after(command, broken, draw.uniform(0, seconds)):
                    here, since = here + 1, since + 1
                    continue
                finish(command, broken)
                unlike = differences(whole, broken)
                print("".join(f"{stage}, {workers} workers: {what} differs\n" for what in unlike), end="", flush=True)
                good += 0 if unlike else since
                since = 0
                shutil.rmtree(broken)
            kills, equal = kills + here, equal + good
            print(f"{stage:<10} {workers} workers: {here} kills, {good} equal to the undisturbed run, bit for bit", flush=True)
    print(f"{kills} kills, {equal} followed by a resumption that ended bitwise equal ({time.monotonic() - began:.0f} s)")
    return 0 if kills == equal > 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
