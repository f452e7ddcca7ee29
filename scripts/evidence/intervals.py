"""What a few samples tell: means with 95 % intervals, and which of two is better."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import special, stats

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean, and half of the width of its interval: NaN where there is none."""

    mean: float
    half: float
    samples: int

    def __str__(self) -> str:
        if self.samples < 2:
            return f"{self.mean:.2f}" if self.samples else ""
        return f"{self.mean:.2f} ± {self.half:.2f}"


def student_interval(values: Sequence[float]) -> Interval:
    """Of the mean, 95 %, if the values are independent and normally distributed."""
    count = len(values)
    if count < 2:
        return Interval(values[0] if values else math.nan, math.nan, count)
    half = special.stdtrit(count - 1, 0.975) * statistics.stdev(values) / math.sqrt(count)
    return Interval(statistics.mean(values), float(half), count)


class Comparison(NamedTuple):
    difference: Interval  # of the first minus the second
    verdict: str  # better, worse, not separated, one seed, not run


def compare(first: Mapping[int, float], second: Mapping[int, float]) -> Comparison:
    """Seed -> a value that should be high, of two kinds of run; paired by seed. What the
    interval of the difference does not separate from 0 is not called better.
    """
    seeds = sorted(first.keys() & second.keys())
    difference = student_interval([first[seed] - second[seed] for seed in seeds])
    if len(seeds) < 2:
        return Comparison(difference, "one seed" if seeds else "not run")
    if abs(difference.mean) <= difference.half:
        return Comparison(difference, "not separated")
    return Comparison(difference, "better" if difference.mean > 0 else "worse")


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Rank correlation; NaN where one side is constant."""
    if any(len(set(side)) < 2 for side in zip(*pairs, strict=True)) or not pairs:
        return math.nan
    first, second = (stats.rankdata(side) for side in zip(*pairs, strict=True))
    return statistics.correlation(list(first), list(second))


def bootstrap(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the rank correlation of resampled pairs; NaN where
    there are fewer than five.
    """
    if len(pairs) < 5:
        return math.nan, math.nan
    draw = random.Random(0)
    found = (spearman(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    kept = sorted(value for value in found if not math.isnan(value))
    return kept[round(0.025 * (len(kept) - 1))], kept[round(0.975 * (len(kept) - 1))]
