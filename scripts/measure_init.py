"""Whether pretraining that starts from weights (--init_from) is ahead of one that starts
from random ones, at equal steps, on the photos of the demo (docs/lab/continuing.md).

    python scripts/measure_init.py out/init [--steps 64] [--seeds 0 1 2]

A tokenizer and a model are trained on one half of the training photos; then for each
seed two models are pretrained on the other half with its codes and flags, one from those
weights. k-NN compares the CLS token of the validation photos with that of the other half.
The halves, and the validation photos, are of different blocks of the photos' list. Writes
knn.json; what is there already is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import arguments  # noqa: E402
from advice.command import Command, Machine  # noqa: E402
from advice.inspection import inspect_folder  # noqa: E402
from advice.plan import make_plan  # noqa: E402
from demo_photos import BLOCKS, shrink, solar_cells  # noqa: E402
from errors import report_user_errors  # noqa: E402
from stages import log_of, run_entry  # noqa: E402

EVALUATIONS = 2
CODES = 256


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Pretraining from weights and from random ones", "out/init")
    parser.add_argument("folder", type=arguments.expand_home, help="where photos and runs go")
    for name, steps, what in (
        ("tokenizer_steps", 300, "of the tokenizer"),
        ("source_steps", 192, "of the weights to start from"),
        ("steps", 64, "of the runs that are compared"),
    ):
        parser.add_argument(f"--{name}", type=arguments.positive, default=steps, help=what)
    parser.add_argument(
        "--seeds",
        type=arguments.seed,
        nargs="+",
        default=[0, 1, 2],
        help="each gives a run from weights and one from random ones",
    )
    return parser


def prepare(folder: Path) -> None:
    """folder/{first,second,val}/class/number.jpg, and folder/knn/{train,val}, which are
    second and val.
    """
    photos = solar_cells()
    for number, (source, label, validate) in enumerate(photos):
        block = number * BLOCKS // len(photos)
        split = "val" if validate else "first" if block % 5 < 2 else "second"
        target = folder / split / label / f"{number:06d}.jpg"
        if not target.exists():
            shrink(source, target)
    (folder / "knn").mkdir(exist_ok=True)
    for name, split in (("train", "second"), ("val", "val")):
        if not (folder / "knn" / name).exists():
            (folder / "knn" / name).symlink_to(Path("..") / split, target_is_directory=True)


def train(folder: Path, name: str, command: Command, steps: int, half: str, **more: Any) -> None:
    images = len(list((folder / half).rglob("*.jpg")))
    epochs = max(1, round(steps / (images // int(command.value("batch_size")))))
    if "knn_data_path" in more:
        more["knn_freq"] = max(1, epochs // EVALUATIONS)
    more |= {"data_path": folder / half, "output_dir": folder / name, "epochs": epochs}
    more |= {"warmup_steps": steps // 6, "image_freq": 0, "num_workers": 2, "device": "cpu"}
    run_entry(name, command.script, "", *command.words(**more))


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    folder = Path(args.folder).absolute()
    prepare(folder)
    # a solar cell can be mounted either way
    photos = dataclasses.replace(inspect_folder(str(folder / "first")), has_up=False)
    vqkd, pretrain, _ = make_plan(photos, Machine.here("cpu"), str(folder))
    train(folder, "vqkd", vqkd, args.tokenizer_steps, "first", codebook_n_emd=CODES)
    codes: dict[str, Any] = {
        "codebook_size": CODES,
        "tokenizer_weight": folder / "vqkd/checkpoint.pth",
        "knn_data_path": folder / "knn",
    }
    train(folder, "source", pretrain, args.source_steps, "first", **codes)
    start: dict[str, Any] = {"init_from": folder / "source/checkpoint.pth"}
    results: dict[str, dict[str, list[float]]] = {"random": {}, "init_from": {}}
    for seed in args.seeds:
        for name, weights in (("random", {}), ("init_from", start)):
            run = f"{name}-{args.steps}-{seed}"
            train(folder, run, pretrain, args.steps, "second", **codes, **weights, seed=seed)
            for line in log_of(folder / run):
                if "test_knn_acc1" in line:
                    results[name].setdefault(str(line["epoch"] + 1), []).append(line["test_knn_acc1"])
    reached = [line["test_knn_acc1"] for line in log_of(folder / "source") if "test_knn_acc1" in line]
    (folder / "knn.json").write_text(json.dumps({"source": reached, **results}, indent=1) + "\n")
    print(f"\nk-NN accuracy, %: the weights that --init_from starts from have {reached[-1]:.1f}")
    for name, epochs in results.items():
        for epoch, values in epochs.items():
            print(
                f"{name:<10} epoch {epoch:>3}  mean {statistics.mean(values):5.1f}  "
                + " ".join(f"{value:.1f}" for value in values)
            )


if __name__ == "__main__":
    main()
