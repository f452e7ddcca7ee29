"""How quickly the demo's photos of solar cells reach 80 % (docs/lab/speedrun.md).

    python scripts/speedrun.py out/speedrun [--attempts advised short-96] [--seeds 0 1 2 3 4]

An attempt is a tokenizer, a pretraining and a fine-tuning with all labels, whose flags
are the advised ones with the changes below. A seed is that of all three. What counts is
the accuracy at the end, of all validation photos. Writes results/ATTEMPT-s0.json and so
on; what is there is not run again, and attempts of the same tokenizer or pretraining
share it. CPU seconds are of all processes of a stage, start and evaluation included:
so each stage is a process of its own, as in the demo. Pictures are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import arguments  # noqa: E402
from advice.command import Command  # noqa: E402
from errors import report_user_errors  # noqa: E402
from evidence.intervals import student_interval  # noqa: E402
from photo_runs import prepare, run  # noqa: E402
from stages import log_of  # noqa: E402

PATHS = ("data_path", "eval_data_path", "output_dir", "tokenizer_weight", "finetune")
STAGES = ("vqkd", "pretrain", "finetune")
AT_96 = {"input_size": "96", "teacher_input_size": "96"}
SHORT_VQKD = {"epochs": "3", "batch_size": "16", "lr": "6e-3", "quantizer_warmup_steps": "60", **AT_96}
SHORT = {"epochs": "4", "batch_size": "16"}
ALL_96 = {"predict": "all", "input_size": "96", "second_input_size": "96", "num_mask_patches": "14"}
PLAIN = {"layer_scale_init_value": "0"}
# attempt: changes of the tokenizer's, of pretraining's and of fine-tuning's flags
ATTEMPTS: dict[str, dict[str, dict[str, str]]] = {
    "advised": {},
    "advised-plain": {"pretrain": PLAIN, "finetune": PLAIN},
    "short-96": {"vqkd": SHORT_VQKD, "pretrain": SHORT | ALL_96, "finetune": SHORT},
    "short-96-throughout": {
        "vqkd": SHORT_VQKD,
        "pretrain": SHORT | ALL_96,
        "finetune": SHORT
        | {"epochs": "6", "lr": "1.5e-3", "input_size": "96"}
        | {"drop_path": "0", "min_crop_scale": "0.7", "crop_pct": "1.0"},
    },
    "short-96-plain": {
        "vqkd": SHORT_VQKD,
        "pretrain": SHORT | ALL_96 | PLAIN | {"epochs": "3"},
        "finetune": SHORT | PLAIN | {"drop_path": "0"},
    },
    "short-128-plain": {
        "vqkd": SHORT | {"epochs": "2", "lr": "6e-3", "quantizer_warmup_steps": "40"},
        "pretrain": SHORT | PLAIN | {"predict": "all"},
        "finetune": SHORT | PLAIN | {"drop_path": "0"},
    },
}


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("How quickly the photos reach 80 %", "out/speedrun --seeds 0 1 2 3 4")
    add = parser.add_argument
    add("folder", type=arguments.expand_home, help="where photos and runs go")
    add("--attempts", nargs="+", default=["advised"], choices=tuple(ATTEMPTS), help="rows of the table")
    add("--seeds", type=arguments.seed, nargs="+", default=[0, 1, 2, 3, 4], help="of all three stages")
    add("--num_workers", type=arguments.not_negative, default=2, help="data processes")
    return parser


def measure(folder: Path, plan: list[Command], attempt: str, seed: int, num_workers: int) -> dict[str, Any]:
    """One chain; stages that are there are not run again."""
    images = len(list((folder / "data/train").rglob("*.jpg")))
    changes, found, digest = ATTEMPTS[attempt], {"attempt": attempt, "seed": seed}, hashlib.sha256()
    weights: dict[str, dict[str, Any]] = {"vqkd": {}, "finetune": {"no_save_ckpt": True}}
    for command in plan:
        stage = command.stage
        command = command.reschedule(images, **changes.get(stage, {}))
        digest.update(" ".join(command.words(**dict.fromkeys(PATHS))).encode())
        out = folder / f"{stage}-{digest.hexdigest()[:8]}-s{seed}"
        kept = out / "cost.json"
        if not kept.exists():
            shutil.rmtree(out, ignore_errors=True)  # a stage that was killed has cost more than its rest
            started, cpu = time.monotonic(), children_seconds()
            more = {"seed": seed, "num_workers": num_workers, **weights[stage]}
            run(command, out, warmup_steps=command.value("warmup_steps"), **more)
            cost = {"cpu": children_seconds() - cpu, "wall": time.monotonic() - started}
            kept.write_text(json.dumps(cost | {"steps": command.steps}) + "\n")
        found[stage] = json.loads(kept.read_text())
        if stage == "vqkd":
            weights["pretrain"] = {"tokenizer_weight": out / "checkpoint.pth"}
        elif stage == "pretrain":
            weights["finetune"]["finetune"] = out / "checkpoint.pth"
            found["mlm_acc"] = 100 * log_of(out)[-1]["test_mlm_acc_1"]
    return found | {"acc1": log_of(out)[-1]["test_acc1"]}


def children_seconds() -> float:
    """CPU time of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def print_table(found: dict[str, list[dict[str, Any]]]) -> None:
    print(f"\n{'attempt':<20}{'seeds':>6}{'acc1':>16}{'CPU s':>8}  of the stages    steps")
    for attempt, results in found.items():
        cpu, steps = (
            [statistics.mean(result[stage][what] for result in results) for stage in STAGES]
            for what in ("cpu", "steps")
        )
        print(
            f"{attempt:<20}{len(results):>6}{student_interval([result['acc1'] for result in results])!s:>16}"
            f"{sum(cpu):>8.0f}  {' + '.join(f'{each:.0f}' for each in cpu):<17}"
            f"{' + '.join(f'{each:.0f}' for each in steps)}"
        )


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    folder = Path(args.folder).absolute()
    plan = prepare(folder)
    (folder / "results").mkdir(exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {attempt: [] for attempt in args.attempts}
    for seed in args.seeds:
        for attempt in args.attempts:
            path = folder / "results" / f"{attempt}-s{seed}.json"
            if not path.exists():
                result = measure(folder, plan, attempt, seed, args.num_workers)
                path.write_text(json.dumps(result, indent=1) + "\n")
            found[attempt].append(json.loads(path.read_text()))
    print_table(found)


if __name__ == "__main__":
    main()
