"""Running means: weights, values that are not finite, and ranks that saw nothing."""

import math

import pytest
import torch
from many_processes import run_ranks

from errors import UserError
from metrics import RunningMeans, accuracy, forget_epochs_from, top_k_correct


def test_a_damaged_log_is_told(tmp_path):
    for text in ('{"epoch": 0}\n{"epo\n', "[" * 100_000 + "\n", "[]\n", "{}\n"):
        (tmp_path / "log.txt").write_text(text)
        with pytest.raises(UserError, match=r"log\.txt: a line is not the JSON object of an epoch"):
            forget_epochs_from(1, tmp_path / "log.txt")


def test_weighted_means_leave_out_what_is_not_finite():
    means = RunningMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(float("nan"))}, weight=3)
    means.add({"a": torch.tensor(5.0), "b": torch.tensor(2.0)}, weight=1)
    assert means.read() == {"a": 2.0, "b": 2.0}
    assert RunningMeans().read() == {}


def test_a_mean_of_nothing_finite_is_nan():
    means = RunningMeans()
    means.add({"a": torch.tensor(float("inf"))})
    assert math.isnan(means.read()["a"])


def _share(rank, world_size):
    means = RunningMeans()
    if rank == 1:
        means.add({"a": torch.tensor(3.0)})
    return {name: torch.tensor(value) for name, value in means.read(over_all_ranks=True).items()}


def test_a_rank_that_saw_nothing_takes_part():
    assert [result["a"] for result in run_ranks(_share, 2)] == [3.0, 3.0]


def test_accuracies():
    logits = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1]])
    assert accuracy(logits, torch.tensor([1, 1])) == 0.5
    assert accuracy(logits, torch.tensor([[0.0, 1.0, 0.0], [0.6, 0.4, 0.0]])) == 1.0
    assert top_k_correct(logits, torch.tensor([2, 1]), 2) == 1
    assert top_k_correct(logits, torch.tensor([2, 1]), 5) == pytest.approx(2)  # fewer classes than k
