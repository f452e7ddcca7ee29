"""Every stage on a GPU on paper (cuda_on_paper.py): forward, backward, update,
evaluation, pictures and checkpoint, from the command line down.
"""

import sys

import pytest
from cuda_on_paper import cuda_on_paper
from tiny_runs import (
    SIZE,
    as_flags,
    finetuning_flags,
    labeled_pixels,
    log_lines,
    photos,
    pretraining_flags,
    segmentation_flags,
    student,
    vqkd_flags,
)

import engine
import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_segmentation_finetuning
import run_vqkd_training
from evaluation import held_out

SHORT = as_flags(epochs=1, warmup_epochs=0)
AUGMENT = ["--data_pipeline", "fast", "--augment_on_device"]
EVERYTHING = as_flags(update_freq=2, clip_grad=1.0, image_freq=1)
EMA = as_flags(model_ema=True, model_ema_decay=0.5)


class Watched:
    """Notes of each training step, and of each batch that is evaluated."""

    def __init__(self, paper, monkeypatch):
        self.paper, self.steps, self.batches = paper, [], []
        self.train_one_step, self.evaluation_batches = (
            engine.Trainer.train_one_step,
            held_out.evaluation_batches,
        )
        monkeypatch.setattr(engine.Trainer, "train_one_step", lambda *args: self.step(*args))
        for module in [m for m in sys.modules.values() if hasattr(m, "evaluation_batches")]:
            monkeypatch.setattr(module, "evaluation_batches", self.evaluated)

    def step(self, trainer, micro_batches):
        with self.paper.noting() as notes:
            self.train_one_step(trainer, micro_batches)
        self.steps.append(notes)

    def evaluated(self, *args, **kwargs):
        """What is between one batch and the next, after the first."""
        start = None
        for batch in self.evaluation_batches(*args, **kwargs):
            if start is not None:
                self.batches.append(self.paper.notes[start:])
            start = len(self.paper.notes)
            yield batch


def found(groups, kind):
    """Where it happened, each place once."""
    return {f"{note.where} {note.what}" for notes in groups for note in notes if note.kind == kind}


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Run an entry on the GPU on paper; where steps and evaluation waited."""

    def run(main, flags, dtype="bf16"):
        with cuda_on_paper() as paper:
            watched = Watched(paper, monkeypatch)
            main([*flags, "--device", "cuda", "--amp_dtype", dtype])
        assert watched.steps
        return watched

    return run


def check(watched, but=()):
    """No step waits for the device, nor does an evaluated batch, but in the functions
    and files of `but`.
    """
    steps, batches = (
        [[n for n in notes if not {n.function, n.where.split(":")[0]} & set(but)] for notes in groups]
        for groups in (watched.steps, watched.batches)
    )
    assert found(steps, "read") == set()
    assert found(steps[1:], "copy") == set()  # the first one also copies what stays there
    assert found(batches, "read") == set()
    assert found(batches, "copy") == set()


both = pytest.mark.parametrize("dtype", ["bf16", "fp16"])


@both
def test_pretraining(dtype, data, tokenizer_weight, tmp_path, train):
    labeled = photos(tmp_path / "labeled" / "train").parent
    photos(labeled / "val")
    held_out = as_flags(eval_data_path=data, knn_freq=1, knn_data_path=labeled)
    more = [*SHORT, *AUGMENT, *EVERYTHING, *held_out]
    flags = pretraining_flags(data, tmp_path, tokenizer_weight, *more)
    watched = train(run_beitv2_pretraining.main, flags, dtype)
    assert len(watched.steps) == 2
    check(watched, but=["evaluation/knn.py"])
    assert {"test_loss", "test_mlm_acc_1", "test_knn_acc1"} <= log_lines(tmp_path)[0].keys()
    assert len(list((tmp_path / "pictures").iterdir())) == 1


@both
def test_vqkd(dtype, data, tmp_path, train):
    """A step of warm-up, two that gather features for k-means, and in the second epoch
    a code to revive.
    """
    more = as_flags(quantizer_warmup_steps=1, revive_dead_codes=True, eval_data_path=data)
    more += as_flags(clip_grad=1.0, image_freq=1, codebook_n_emd=2)
    watched = train(run_vqkd_training.main, vqkd_flags(data, tmp_path, *AUGMENT, *more), dtype)
    check(watched, but=["initialize", "cosine_kmeans", "revive"])


@both
def test_finetuning(dtype, data, tmp_path, train):
    more = as_flags(mixup=0.8, cutmix=1.0, smoothing=0.1, model_ema=True, model_ema_decay=0.5)
    flags = finetuning_flags(data, tmp_path, *SHORT, *EVERYTHING, *more)
    check(train(run_class_finetuning.main, flags, dtype))


@both
def test_linear_probe(dtype, data, tmp_path, train):
    weights = student(tmp_path / "student.pth")
    where = as_flags(data_set="image_folder", data_path=data, eval_data_path=data, output_dir=tmp_path)
    flags = [*where, *SIZE, *SHORT, *as_flags(finetune=weights, batch_size=4, lr=0.1)]
    check(train(run_linear_eval.main, flags, dtype))


@both
def test_segmentation(dtype, tmp_path, train):
    pairs = labeled_pixels(tmp_path / "ade")
    flags = segmentation_flags(pairs, tmp_path / "out", *EVERYTHING, *as_flags(max_steps=3))
    check(train(run_segmentation_finetuning.main, flags, dtype))
