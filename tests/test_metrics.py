"""Running means: weights, values that are not finite, and ranks that saw nothing."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from many_processes import run_ranks
from source_files import ROOT, library_files, module_name

from monitoring import progress
from monitoring.run_files import JsonLines
from runtime.metrics import RunningMeans, accuracy, top_k_correct


def test_lines_of_a_log_that_are_not_ours_stay(tmp_path):
    strange = ['{"epo', "[" * 100_000, "[]", "{}", '{"epoch": "x"}']
    log = tmp_path / "log.txt"
    log.write_text("\n".join(['{"epoch": 0}', *strange, '{"epoch": 1}', '{"epoch": 2}']))
    JsonLines(log).go_on_before("epoch", 1)
    assert log.read_text().splitlines() == ['{"epoch": 0}', *strange]


def test_weighted_means_leave_out_what_is_not_finite():
    means = RunningMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(float("nan"))}, weight=3)
    means.add({"a": torch.tensor(5.0), "b": torch.tensor(2.0)}, weight=1)
    assert means.compute() == {"a": 2.0, "b": 2.0}
    assert RunningMeans().compute() == {}


def test_a_mean_of_nothing_finite_is_nan():
    means = RunningMeans()
    means.add({"a": torch.tensor(float("inf"))})
    assert math.isnan(means.compute()["a"])


def _share(rank, world_size):
    means = RunningMeans()
    if rank == 1:
        means.add({"a": torch.tensor(3.0)})
    return {name: torch.tensor(value) for name, value in means.compute(over_all_ranks=True).items()}


@pytest.mark.slow
def test_a_rank_that_saw_nothing_takes_part():
    assert [result["a"] for result in run_ranks(_share, 2)] == [3.0, 3.0]


def test_accuracies():
    logits = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1]])
    assert accuracy(logits, torch.tensor([1, 1])) == 0.5
    assert accuracy(logits, torch.tensor([[0.0, 1.0, 0.0], [0.6, 0.4, 0.0]])) == 1.0
    assert top_k_correct(logits, torch.tensor([2, 1]), 2) == 1
    assert top_k_correct(logits, torch.tensor([2, 1]), 5) == pytest.approx(2)  # fewer classes than k


@pytest.mark.parametrize(("platform", "peak"), [("darwin", 800 * 2**20), ("linux", 800 * 2**10)])
def test_memory_is_in_the_units_of_each_system(platform, peak, monkeypatch):
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=peak))
    monkeypatch.setattr(progress, "resource", usage)
    monkeypatch.setattr(sys, "platform", platform)
    assert progress.peak_memory(torch.device("cpu")) == 800 * 2**20
    monkeypatch.setattr(progress, "resource", None)  # Windows
    assert progress.peak_memory(torch.device("cpu")) is None


AS_ON_WINDOWS = """
import os, signal, sys
import timm, torch, torchvision  # what they need themselves is not ours
import torch.utils.tensorboard, torch.utils.data
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGALRM", "SIGQUIT", "SIGPIPE"):
    delattr(signal, name)
for name in "sched_getaffinity getuid geteuid fork killpg getpgid O_NONBLOCK O_NOFOLLOW".split():
    delattr(os, name)
for name in sys.argv[1:]:
    __import__(name)
from data_pipeline import samplers
samplers._start_worker(0)
"""


@pytest.mark.slow
def test_all_modules_can_be_imported_without_unix_names():
    names = [module_name(path) for path in library_files()]
    got = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS, *names], cwd=ROOT, capture_output=True, text=True
    )
    assert got.returncode == 0, got.stderr[-1500:]
