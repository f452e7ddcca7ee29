"""Kill training runs with -9 at random moments, resume each by the same line, and compare with an undisturbed run, bit for bit.

    python scripts/kill_test.py [--kills 20] [--seed 0]

The kills are spread over the four stages, each with 0 and with 2 data workers, on tiny models. Prints the count.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_runs  # noqa: E402

import arguments  # noqa: E402

EPOCHS = "6"


def commands(folder: Path, workers: int) -> dict[str, list[str]]:
    """Script and flags of each stage, but for --output_dir."""
    data, out = tiny_runs.photos(folder / "photos", per_class=24), Path("OUT")
    codes = tiny_runs.tokenizer(folder / "tokenizer.pth")
    pairs = tiny_runs.labelled_pixels(folder / "pairs", images=24)
    often = ["--num_workers", str(workers), "--save_ckpt_steps", "3", "--print_freq", "1"]
    more = [*often, "--epochs", EPOCHS]
    steps = ["--max_steps", "33", "--steps_per_epoch", "12"]  # the last epoch is cut
    mixed = ["--mixup", "0.8", "--cutmix", "1.0", "--model_ema", "--drop_path", "0.1"]
    revived = ["--quantizer_warmup_steps", "5", "--revive_dead_codes"]
    return {
        "vqkd": ["run_vqkd_training.py", *tiny_runs.vqkd_flags(data, out, *revived, *more)],
        "pretrain": ["run_beitv2_pretraining.py", *tiny_runs.pretraining_flags(data, out, codes, "--drop_path", "0.1", *more)],
        "finetune": ["run_class_finetuning.py", *tiny_runs.finetuning_flags(data, out, *mixed, *more)],
        "segment": ["run_segmentation_finetuning.py", *tiny_runs.segmentation_flags(pairs, out, *steps, *often)],
    }


def start(command: list[str], out: Path) -> subprocess.Popen[str]:
    words = [str(out) if word == "OUT" else word for word in command]
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=600)
    if process.returncode != 0:
        raise SystemExit(f"a run failed (status {process.returncode}):\n{output[-3000:]}")


def kill_at(process: subprocess.Popen[str], line: int, delay: float) -> bool:
    """SIGKILL `delay` seconds after the run's progress line number `line`; False if it ended before."""
    seen = 0
    assert process.stdout is not None
    for text in process.stdout:
        seen += text.startswith("epoch ") and "[" in text
        if seen >= line:
            time.sleep(delay)
            break
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=arguments.positive, default=20)
    parser.add_argument("--seed", type=arguments.seed, default=0)
    return parser


def main() -> int:
    args = get_parser().parse_args()
    torch.set_num_threads(1)
    draw, kills, equal = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [(stage, workers) for workers in (0, 2) for stage in ("vqkd", "pretrain", "finetune", "segment")]
        for number, (stage, workers) in enumerate(cases):
            share = args.kills // len(cases) + (number < args.kills % len(cases))  # all within one run
            if share == 0:
                continue
            command = commands(folder, workers)[stage]
            whole, broken = folder / f"{stage}-{workers}-whole", folder / f"{stage}-{workers}-broken"
            finish(start(command, whole))
            here = 0
            for _ in range(share):
                here += kill_at(start(command, broken), draw.randint(1, 16), draw.uniform(0, 0.15))
            finish(start(command, broken))
            tiny_runs.assert_same_weights(whole / "checkpoint.pth", broken / "checkpoint.pth")
            losses = [[line["train_loss"] for line in tiny_runs.log_lines(out)] for out in (whole, broken)]
            assert losses[0] == losses[1], f"{stage}: log.txt differs"
            kills, equal = kills + here, equal + here
            print(f"{stage:<10} {workers} workers: {here} kills, then equal to the undisturbed run, bit for bit", flush=True)
    print(f"{kills} kills, {equal} followed by a resumption that ended bitwise equal")
    return 0 if kills == equal > 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
