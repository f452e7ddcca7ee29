"""Flags of k nearest neighbors, in pretraining and in the linear probe's command."""

from __future__ import annotations

from typing import Any

from arguments import (
    above_zero,
)


def add_knn_flags(group: Any) -> None:
    group.add_argument(
        "--knn_temperature", type=above_zero, default=0.07, help="a neighbor's vote is exp(similarity / this)"
    )
    group.add_argument(
        "--knn_standardize",
        action="store_true",
        help="channels to mean 0 and std 1 over the training images before they are compared",
    )
