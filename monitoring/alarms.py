"""Alarms of a run: one sentence each, with what to do. What is judged is a condition;
it is told when it begins to hold, and not again before it has gone.

A finder gives kind -> the sentence, or None where the figures show that all is well;
a kind that they do not show is left out.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from runtime.terminal import log

Line = dict[str, Any]  # of log.txt
Found = dict[str, str | None]

UNEVEN = 1 / 4  # a smaller perplexity, as a share of the codes in use
UNEVEN_TARGETS = 1 / 8  # a tokenizer of other images may be less even
SMALLEST_SHARE = 1 / 64  # of all codes
FEW_PREDICTED = 1 / 40  # a smaller perplexity of the predictions, as a share of the targets'
RANK_LEFT = 1 / 2  # of the best one
NEAR_GUESSING = 0.99  # of the loss of guessing
LEAST_WARM_UP = 100  # steps; what a run does in the first ones says little
EXPLODED = 10  # times the median
REPORTS_KEPT, REPORTS_NEEDED = 100, 10
DATA_WAIT, LEAST_WAIT = 0.3, 5.0  # share of the time, seconds in an epoch


class Alarms:
    """Which conditions hold. `lines`: of the epochs before, of which the last one says
    what held then, so that a resumed run does not tell it again. `reports`: those of
    metrics.jsonl. `clips`: gradients are clipped.
    """

    def __init__(self, lines: Iterable[Line] = (), reports: Iterable[Line] = (), clips: bool = False) -> None:
        self.lines = list(lines)
        self.active: set[str] = set(self.lines[-1].get("alarms", ())) if self.lines else set()
        norms = (report.get("grad_norm") for report in reports)  # None where it was not finite
        self.gradient = GradientWatch((norm for norm in norms if norm is not None), clips)

    def tell(self, found: Found) -> None:
        for kind, sentence in found.items():
            if sentence is None:
                self.active.discard(kind)
            elif kind not in self.active:
                self.active.add(kind)
                log.warning(f"alarm: {sentence}")

    def after_report(self, grad_norm: float) -> None:
        self.gradient.add(grad_norm)
        if self.gradient.sentence:
            self.tell({"gradient": self.gradient.sentence})

    def after_epoch(self, line: Line, found: Found) -> list[str]:
        """The kinds that hold, for the epoch's line."""
        self.tell({"gradient": self.gradient.sentence} | found)
        self.gradient.sentence = None
        self.lines.append(line)
        return sorted(self.active)


class GradientWatch:
    """The gradient norm, a mean for each report: `sentence` from when two in a row are
    above ten times the median of those before.
    """

    def __init__(self, norms: Iterable[float], clips: bool) -> None:
        self.remedy = "lower `lr`, or lengthen the warm-up" + ("" if clips else ", or set `clip_grad` 3.0")
        self.norms = deque((norm for norm in norms if math.isfinite(norm)), maxlen=REPORTS_KEPT)
        self.sentence: str | None = None

    def add(self, norm: float) -> None:
        if not math.isfinite(norm):
            return
        self.norms.append(norm)
        *before, second, last = list(self.norms) if len(self.norms) > 1 else [0.0, norm]
        if len(before) >= REPORTS_NEEDED:
            usual = statistics.median(before)
            if min(second, last) > EXPLODED * usual:
                self.sentence = (
                    f"the gradient norm is {last:.3g}, {last / max(usual, 1e-12):.0f} times what it usually "
                    f"was in this run ({usual:.3g}): {self.remedy}"
                )


def skipped_steps(skipped: int, steps: int) -> Found:
    sentence = (
        f"{skipped} of this epoch's {steps} steps changed nothing, as their loss or gradient was not finite: "
        "lower `lr`, set `clip_grad` 3.0, or try `amp_dtype` fp32"
    )
    return {"skipped_steps": sentence if skipped else None}


def data_wait(waited: float, seconds: float, workers: int, cores: int, could_be_fast: bool) -> Found:
    """`waited` of the `seconds` of an epoch's steps. `workers`: data processes; 0: the
    training process reads. `could_be_fast`: there is a faster `data_pipeline`.
    """
    share = min(waited / max(seconds, 1e-9), 0.99)
    if share <= DATA_WAIT or waited < LEAST_WAIT:
        return {"data_wait": None}
    needed = math.ceil(workers / (1 - share) if workers else share / (1 - share))
    more = f"give `num_workers` {needed} ({needed - workers} more than now)"
    if needed > cores:
        more = f"{workers} data processes are not enough, and this machine has {cores} cores: " + (
            "shrink the images once, or pack them into shards (scripts/make_shards.py)"
        )
    fast = ", or `data_pipeline` fast" if could_be_fast else ""
    return {"data_wait": f"{100 * share:.0f}% of this epoch went into waiting for images: {more}{fast}"}


def cores_of_process() -> int:
    """Those that this process and its data processes have to themselves."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ── The tokenizer ──


def codebook_use(used: int, perplexity: float, n_codes: int, revives: bool) -> Found:
    """The codes that an epoch used, and their perplexity."""
    few = uneven = None
    if used < n_codes / 2:
        few = (
            f"only {used} of {n_codes} codes were used in this epoch: try fewer codes (`codebook_n_emd`), "
            "code dim 32 (`codebook_emd_dim`), k-means after a warm-up (`quantizer_warmup_steps` 100), "
            f"{'' if revives else '`revive_dead_codes`, '}or a larger batch"
        )
    if perplexity < UNEVEN * used:
        uneven = (
            f"{used} codes were used in this epoch, but so unevenly that {perplexity:.0f} used equally would "
            "say as much (perplexity), as most patches share a few: try `standardize_teacher` on, another "
            "teacher (`teacher_model_type`), a longer `quantizer_warmup_steps`, or images with less empty "
            "background"
        )
    return {"few_codes": few, "uneven_codes": uneven}


# ── Pretraining ──


def target_codes(used: int, perplexity: float, n_codes: int) -> Found:
    """Of the targets of an epoch."""
    least = max(UNEVEN_TARGETS * used, SMALLEST_SHARE * n_codes, 2.0)
    sentence = (
        f"the targets have a perplexity of {perplexity:.0f} ({used} of {n_codes} codes occur): most patches "
        "share a few codes, and there is little to learn: train the tokenizer on these images until its "
        "perplexity is higher (docs/tokenizer.md), or take another one"
    )
    return {"target_codes": sentence if perplexity < least else None}


def predicted_codes(predicted: float, targets: float) -> Found:
    """Perplexities."""
    sentence = (
        f"the model predicts nearly the same code everywhere: its predictions have a perplexity of "
        f"{predicted:.1f}, the targets {targets:.0f}: lower `lr`, or lengthen the warm-up"
    )
    return {"predicted_codes": sentence if predicted < max(FEW_PREDICTED * targets, 1.5) else None}


def flat_loss(losses: dict[str, float], target_perplexity: float, n_codes: int) -> Found:
    """`losses` of the branches after the warm-up, by name. Who knows nothing of an image
    but how frequent the codes are has the logarithm of their perplexity, which is
    ln K where all are equally frequent.
    """
    guessing = math.log(max(1.0, min(target_perplexity, n_codes)))
    flat = [name for name, loss in losses.items() if loss > NEAR_GUESSING * guessing]
    values = " and ".join(f"{name} {losses[name]:.3g}" for name in flat)
    sentence = (
        f"after the warm-up the loss is that of guessing codes by how frequent they are ({values}; guessing "
        f"has {guessing:.3g}, ln {n_codes} is {math.log(n_codes):.3g}): try a tenth of `lr`, then ten times "
        "it, and look at the targets in pictures/"
    )
    return {"flat_loss": sentence if flat else None}


def falling_rank(name: str, line: Line, earlier: Sequence[Line]) -> Found:
    """The figure `name` against its best after the warm-up."""
    if name not in line:
        return {}
    best = max((each[name] for each in earlier if math.isfinite(each.get(name, math.nan))), default=0.0)
    sentence = (
        f"{name} fell to {line[name]:.1f}, less than half of its best ({best:.1f}): the features of "
        "different images become alike: lower `lr`, and go on from an earlier checkpoint"
    )
    return {name.removeprefix("health_"): sentence if line[name] < RANK_LEFT * best else None}
