"""Every stage on a GPU on paper (cuda_on_paper.py)."""

import contextlib

import pytest
from cuda_on_paper import cuda_on_paper
from tiny_runs import log_lines, pretraining_flags

import engine
import run_beitv2_pretraining

ON_CUDA = ["--device", "cuda"]


@contextlib.contextmanager
def watched(monkeypatch):
    """The notes of each training step, a list a step."""
    original, steps = engine.Trainer.train_one_step, []
    with cuda_on_paper() as paper:

        def train_one_step(self, micro_batches):
            with paper.noting() as notes:
                original(self, micro_batches)
            steps.append(notes)

        monkeypatch.setattr(engine.Trainer, "train_one_step", train_one_step)
        yield steps


def reads(steps):
    """Where a step waited for the device."""
    return {note.where for notes in steps for note in notes if note.kind == "read"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_pretraining(dtype, data, tokenizer_weight, tmp_path, monkeypatch):
    flags = pretraining_flags(data, tmp_path, tokenizer_weight, *ON_CUDA, "--amp_dtype", dtype)
    with watched(monkeypatch) as steps:
        run_beitv2_pretraining.main(flags)
    assert len(steps) == 8
    assert reads(steps) == set()
    assert log_lines(tmp_path)[-1]["train_loss"] < 6
