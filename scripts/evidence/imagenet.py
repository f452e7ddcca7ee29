"""The published orderings at the published size: which recipes, and what they gave.

A variant is a tokenizer (published, or one that is trained), a pretraining of base for 300
epochs and a fine-tuning. What the papers give is in docs/ablations.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from evidence import tables
from evidence.runs import read_results, write_result
from monitoring import environment

ROOT = Path(__file__).resolve().parent.parent.parent
FINETUNE_V1 = ("scripts/finetune/base_v1_pt22k.sh", "--imagenet_default_mean_and_std")
FINETUNE_V2 = ("scripts/finetune/base_v2_300e.sh",)
V1, V2 = "scripts/ablations/v1_{}.sh", "scripts/ablations/v2_{}.sh"


@dataclass(frozen=True)
class Variant:
    """Recipes with the flags that follow their names."""

    pretrain: tuple[str, ...]
    finetune: tuple[str, ...]
    tokenizer: tuple[str, ...] = ()

    @property
    def stages(self) -> dict[str, tuple[str, ...]]:
        """Stage -> recipe and flags, in order."""
        found = {"vqkd": self.tokenizer, "pretrain": self.pretrain, "finetune": self.finetune}
        return {stage: words for stage, words in found.items() if words}


def v2(*flags: str, tokenizer: str = "") -> Variant:
    recipe = V2.format(tokenizer) if tokenizer else ""
    return Variant(("scripts/pretrain/base_300e.sh", *flags), FINETUNE_V2, (recipe,) if recipe else ())


VARIANTS = {
    **{
        f"v1-{name.replace('_', '-')}": Variant((V1.format(name),), FINETUNE_V1)
        for name in ("300e", "pixels", "random_masks", "predict_all", "no_mask")
    },
    "v2-base": v2(),
    "v2-no-cls-head": Variant((V2.format("no_cls_head"),), FINETUNE_V2),
    "v2-dino": v2(tokenizer="teacher_dino"),
    "v2-codes-1024": v2("--codebook_size", "1024", tokenizer="codebook_size_1024"),
    "v2-dim-16": v2("--codebook_dim", "16", tokenizer="codebook_dim_16"),
}
ROWS = (  # first, second, what the papers say
    ("v1-300e", "v1-pixels", "82.9, 81.0"),
    ("v1-300e", "v1-random-masks", "82.9, 82.8"),
    ("v1-300e", "v1-predict-all", "82.9, 82.6"),
    ("v1-300e", "v1-no-mask", "82.9, 81.7"),
    ("v2-base", "v1-300e", "85.0, 82.9"),
    ("v2-base", "v2-no-cls-head", ""),
    ("v2-base", "v2-dino", ""),
    ("v2-base", "v2-codes-1024", ""),
    ("v2-base", "v2-dim-16", ""),
)


def words_of(name: str, stage: str, seed: int, data: str, output: Path) -> tuple[list[str], dict[str, str]]:
    """Of the recipe of a stage: its command, and the variables that it reads."""
    words = list(VARIANTS[name].stages[stage])
    weights = {"pretrain": ("tokenizer_weight", "vqkd"), "finetune": ("finetune", "pretrain")}
    if stage in weights and weights[stage][1] in VARIANTS[name].stages:
        flag, before = weights[stage]
        words += [f"--{flag}", str(output / f"{name}-s{seed}" / before / "checkpoint.pth")]
    variables = {
        "DATA": data if stage == "finetune" else str(Path(data, "train")),
        "OUTPUT": str(output / f"{name}-s{seed}" / stage),
    }
    return ["bash", *words, "--seed", str(seed)], variables


# ── What it would take ──


def estimate(name: str, stage: str, gpu: str, price: float) -> tuple[int, float, float]:
    """GPUs, hours and price of a stage, as estimate.py calculates them."""
    command, variables = words_of(name, stage, 0, "/data", Path("/runs"))
    dry = {**os.environ, **variables, "DRY_RUN": "1"}
    words = subprocess.run(
        command, cwd=ROOT, env=dry, capture_output=True, text=True, check=True
    ).stdout.split()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "estimate.json")
        options = ["--gpu", gpu, "--price", f"{price}", "--output", str(path)]
        process = subprocess.run(
            [sys.executable, "estimate.py", *words, *options], cwd=ROOT, capture_output=True, text=True
        )
        if process.returncode:
            raise UserError(f"estimate.py failed for {name}, {stage}: {process.stderr.strip()}")
        found = json.loads(path.read_text())
    gpus = int(words[words.index("--nproc_per_node") + 1])
    return gpus, found["hours"], found["price"]


def print_plan(names: Iterable[str], gpu: str, price: float) -> None:
    """A line for each stage; the same command of two variants is estimated once."""
    known: dict[tuple[str, ...], tuple[int, float, float]] = {}
    print(f"{'variant':<18}{'stage':<10}{'GPUs':>5}{'hours':>9}{'price':>10}   ({gpu}, {price:g} an hour)")
    totals = [0.0, 0.0]
    for name in names:
        for stage, words in VARIANTS[name].stages.items():
            if words not in known:
                known[words] = estimate(name, stage, gpu, price)
            gpus, hours, cost = known[words]
            totals = [totals[0] + gpus * hours, totals[1] + cost]
            print(f"{name:<18}{stage:<10}{gpus:>5}{hours:>9.1f}{cost:>10.0f}", flush=True)
    print(f"one seed in all: {totals[0]:,.0f} GPU hours, {totals[1]:,.0f}")


# ── Running, and what came out ──


def run(name: str, seed: int, data: str, output: Path, results: Path) -> None:
    """What is missing of a variant; its recipes go on where they were."""
    if (results / f"imagenet-{name}-s{seed}.json").exists():
        return
    for stage in VARIANTS[name].stages:
        command, variables = words_of(name, stage, seed, data, output)
        print(" ".join([*(f"{key}={value}" for key, value in variables.items()), *command]), flush=True)
        if subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}).returncode:
            raise UserError(f"{name}, seed {seed}: {stage} failed; the same command goes on")
    write_result(results, summarize(name, seed, output / f"{name}-s{seed}" / "finetune"))


def summarize(name: str, seed: int, folder: Path) -> dict[str, Any]:
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    facts = environment.read(folder / environment.ENVIRONMENT) or {}
    return {
        "name": f"imagenet-{name}-s{seed}",
        "variant": name,
        "seed": seed,
        "recipes": VARIANTS[name].stages,
        **{key: facts.get(key) for key in ("commit", "gpu", "processes", "torch")},
        "results": {"test_acc1": log[-1]["test_acc1"]},
    }


def print_table(results: Path) -> None:
    """As those of the small runs are made."""
    found: dict[str, dict[int, float]] = {name: {} for name in VARIANTS}
    for result in read_results(results):
        found[result["variant"]][result["seed"]] = result["results"]["test_acc1"]
    print("\n".join(tables.list_judgments(list_rows(found))))


def list_rows(found: dict[str, dict[int, float]]) -> Sequence[tuple[str, str, tables.Judgment]]:
    return [
        (f"{first} − {second}" + (f" (paper: {paper})" if paper else ""), "ImageNet-1k", judged)
        for first, second, paper in ROWS
        for judged in [tables.judge(found[first], found[second])]
    ]
