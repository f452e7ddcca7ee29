"""What is kept of a run's log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evidence.photos import count_classes
from evidence.runs import Run

DIGITS = 6
LAYER = "test_acc1_layer"
# of the last line of the log
LAST = {
    "vqkd": ("train_loss", "test_loss", "train_codes_used", "train_perplexity", "test_perplexity"),
    "pretrain": (
        *("train_loss", "test_loss", "train_mlm_acc", "test_mlm_acc", "train_mlm_acc_1", "test_mlm_acc_1"),
        *("train_majority_code_share", "test_knn_acc1"),
    ),
    "finetune": ("train_loss", "test_loss", "test_acc1", "test_balanced_acc"),
    "linear": (),
    "segment": ("train_loss", "test_miou", "test_macc", "test_aacc"),
}


def summarize(run: Run, log: list[dict[str, Any]], photos: Path) -> dict[str, Any]:
    """Plain numbers, rounded so that a JSON is short; what the log lacks is left out."""
    last = log[-1]
    found = {name: last[name] for name in LAST[run.stage] if last.get(name) is not None}
    if run.stage == "pretrain":
        quarter = log[len(log) // 4 - 1]
        found["health_at_25_percent"] = numbers(quarter, "health_")
        found["health_at_the_end"] = numbers(last, "health_")
    if run.stage == "linear":
        last_layer = max(int(name.removeprefix(LAYER)) for name in last if name.startswith(LAYER))
        found |= numbers(last, LAYER) | {"test_acc1_last_layer": last[f"{LAYER}{last_layer}"]}
    if run.stage in ("finetune", "linear"):
        counts = count_classes(photos / "val").values()
        found["majority_class"] = 100 * max(counts) / sum(counts)
    return {name: shorten(value) for name, value in found.items()}


def numbers(line: dict[str, Any], prefix: str) -> dict[str, float]:
    return {
        key: value for key, value in line.items() if key.startswith(prefix) and isinstance(value, int | float)
    }


def shorten(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: shorten(each) for name, each in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
