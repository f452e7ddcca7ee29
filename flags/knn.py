"""Flags of k nearest neighbors, by themselves and while a model pretrains."""

from __future__ import annotations

import argparse
from typing import Any

from arguments import above_zero, expand_home, not_negative


def add_knn_flags(group: Any) -> None:
    group.add_argument(
        "--knn_temperature", type=above_zero, default=0.07, help="a neighbor's vote is exp(similarity / this)"
    )
    group.add_argument(
        "--knn_standardize",
        action="store_true",
        help="channels to mean 0 and std 1 over the training images before they are compared",
    )


def add_knn_monitor_flags(parser: argparse.ArgumentParser) -> None:
    """k-NN accuracy while a model pretrains (evaluation/knn.py)."""
    g = parser.add_argument_group("k-NN during pretraining")
    g.add_argument(
        "--knn_freq",
        type=not_negative,
        default=0,
        help="epochs between k-NN evaluations of the student; 0: none",
    )
    g.add_argument(
        "--knn_data_path",
        type=expand_home,
        default="",
        help="labeled images for it: train/class/image and val/class/image",
    )
    add_knn_flags(g)
