"""How good the advice of advise.py is (docs/lab/advice.md).

    python scripts/measure_advice.py out/advice folder_with_train_and_val [more folders]

For each folder of labeled images: the three advised command lines are run; then
fine-tuning is repeated with other learning rates and layer decays, and from random
weights with several rates. Writes NAME/results.json: codes used, perplexity, accuracy of
each run. What has a result already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import arguments  # noqa: E402
from advice.command import Command, Machine  # noqa: E402
from advice.inspection import inspect_folder  # noqa: E402
from advice.plan import make_plan  # noqa: E402
from errors import report_user_errors  # noqa: E402
from stages import log_of, run_entry  # noqa: E402

# multiples of the advised learning rate; layer decay None: the advised one
GRID: list[tuple[float, float | None]] = [(0.5, None), (2, None), (1, 0.65), (1, 0.9), (1, 1.0)]
FROM_SCRATCH = [5e-4, 1e-3, 2e-3]


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("How good the advice is", "out/advice photos more_photos")
    parser.add_argument("output", type=arguments.expand_home, help="where the runs go")
    parser.add_argument(
        "folders", type=arguments.expand_home, nargs="+", help="train/ and val/, one folder per class in each"
    )
    parser.add_argument("--num_workers", type=arguments.not_negative, default=1, help="data processes")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of every run")
    return parser


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    for folder in args.folders:
        measure(Path(folder).absolute(), Path(args.output, Path(folder).name).absolute(), args)


def measure(folder: Path, output: Path, args: argparse.Namespace) -> None:
    report = inspect_folder(str(folder))
    vqkd, pretrain, finetune = make_plan(report, Machine.here("cpu"), str(output))
    for command in (vqkd, pretrain):
        run(command, command.stage, output, args)
    log = log_of(output / "vqkd")[-1]
    results: dict[str, Any] = {"images": report.images, "held_out": report.held_out}
    results |= {name: log[f"train_{name}"] for name in ("codes_used", "perplexity")}
    results["codes"] = int(vqkd.value("codebook_n_emd"))
    log = log_of(output / "pretrain")[-1]
    results["masked_accuracy"] = 100 * log["test_mlm_acc_1"]
    results["majority_code_share"] = 100 * log["train_majority_code_share"]
    lr = float(finetune.value("lr"))
    results["accuracy"] = {"advised": run(finetune, "finetune", output, args)}
    for factor, decay in GRID:
        name = f"lr_x{factor:g}_decay_{'advised' if decay is None else decay}"
        layers = {} if decay is None else {"layer_decay": decay}
        results["accuracy"][name] = run(finetune, name, output, args, lr=lr * factor, **layers)
    for rate in FROM_SCRATCH:
        name, scratch = f"scratch_{rate:g}", {"finetune": None, "layer_decay": 1.0}
        results["accuracy"][name] = run(finetune, name, output, args, lr=rate, **scratch)
        (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def run(
    command: Command, name: str, output: Path, args: argparse.Namespace, **changes: object
) -> float | None:
    """The last accuracy on the validation images, where there is one."""
    out = output / name
    epochs = int(command.value("epochs"))
    if not (out / "log.txt").exists() or len(log_of(out)) < epochs:
        more = {"output_dir": out, "device": "cpu", "num_workers": args.num_workers, "seed": args.seed}
        more |= {"image_freq": 0, "eval_freq": epochs}
        more |= {"no_save_ckpt": True} if command.stage == "finetune" else {}
        run_entry(name, command.script, "", *command.words(**more | changes))
    return log_of(out)[-1].get("test_acc1")


if __name__ == "__main__":
    main()
