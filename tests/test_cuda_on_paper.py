"""Every stage on a GPU on paper (cuda_on_paper.py): forward, backward, update,
evaluation, pictures and checkpoint, from the command line down.
"""

import sys

import numpy as np
import pytest
import torch
from cuda_on_paper import CUDA, CudaMistake, cuda_on_paper
from tiny_pretraining import pixel_flags
from tiny_runs import (
    SIZE,
    as_flags,
    encoding_flags,
    finetuning_flags,
    labeled_pixels,
    log_lines,
    photos,
    pretraining_flags,
    segmentation_flags,
    student,
    vqkd_flags,
)

import encode_images
import engine
import extract_features
import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_segmentation_finetuning
import run_vqkd_training
import visualize_attention
from evaluation import held_out

SHORT = as_flags(epochs=1, warmup_epochs=0)
AUGMENT = ["--data_pipeline", "fast", "--augment_on_device"]
EVERYTHING = as_flags(update_freq=2, clip_grad=1.0, image_freq=1)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
        seeded = len(self.paper.seeds)
        with self.paper.noting() as notes:
            self.train_one_step(trainer, micro_batches)
        self.steps.append(notes)
        assert len(self.paper.seeds) == seeded + 1

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
        with cuda_on_paper() as paper, monkeypatch.context() as patch:
            watched = Watched(paper, patch)
            main([*flags, "--device", "cuda", "--amp_dtype", dtype])
        assert watched.steps
        assert DTYPES[dtype] in paper.products
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


both = pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])


@both
def test_pretraining(dtype, data, tokenizer_weight, tmp_path, train):
    labeled = photos(tmp_path / "labeled" / "train").parent
    photos(labeled / "val")
    held_out = as_flags(eval_data_path=data, knn_freq=1, knn_data_path=labeled, health_freq=1)
    more = [*SHORT, *AUGMENT, *EVERYTHING, *held_out]
    flags = pretraining_flags(data, tmp_path, tokenizer_weight, *more)
    watched = train(run_beitv2_pretraining.main, flags, dtype)
    assert len(watched.steps) == 2
    check(watched, but=["evaluation/knn.py"])
    figures = {"test_loss", "test_mlm_acc_1", "test_knn_acc1", "health_mlm_margin", "health_rank_cls"}
    assert figures <= log_lines(tmp_path)[0].keys()
    assert len(list((tmp_path / "pictures").iterdir())) == 1


def test_pretraining_on_kept_codes(data, tokenizer_weight, tmp_path, train):
    """An epoch that stores them, and two that read them."""
    more = as_flags(crop_cycle=1, epochs=3, batch_size=5)
    watched = train(run_beitv2_pretraining.main, pretraining_flags(data, tmp_path, tokenizer_weight, *more))
    assert len(watched.steps) == 9
    check(watched)
    assert (np.load(tmp_path / "codes/crop-0000.npy")["checksum"] > 0).all()


@both
def test_vqkd(dtype, data, tmp_path, train):
    """A step of warm-up, two that gather features for k-means, and in the second epoch
    a code to revive.
    """
    more = as_flags(quantizer_warmup_steps=1, revive_dead_codes=True, eval_data_path=data)
    more += as_flags(clip_grad=1.0, grad_checkpointing=True, codebook_n_emd=2, image_freq=1, health_freq=1)
    watched = train(run_vqkd_training.main, vqkd_flags(data, tmp_path, *AUGMENT, *more), dtype)
    check(watched, but=["initialize", "cosine_kmeans", "revive"])


@both
def test_finetuning(dtype, data, tmp_path, train):
    more = as_flags(mixup=0.8, smoothing=0.1, model_ema=True, model_ema_decay=0.5)
    flags = finetuning_flags(data, tmp_path, *SHORT, *EVERYTHING, *more)
    check(train(run_class_finetuning.main, [*flags, "--class_weights", "balanced"], dtype))
    assert {"test_acc1", "test_ema_acc1"} <= log_lines(tmp_path)[0].keys()


@both
def test_linear_probe(dtype, data, tmp_path, train):
    weights = student(tmp_path / "student.pth")
    where = as_flags(data_set="image_folder", data_path=data, eval_data_path=data, output_dir=tmp_path)
    flags = [*where, *SIZE, *SHORT, *as_flags(finetune=weights, batch_size=4, lr=0.1)]
    check(train(run_linear_eval.main, flags, dtype))


@both
def test_segmentation(dtype, tmp_path, train):
    """Evaluated by windows, and (bf16) as whole images, whose grid is not the
    model's.
    """
    pairs = labeled_pixels(tmp_path / "ade")
    more = [*EVERYTHING, *as_flags(max_steps=3), *(["--whole_image"] if dtype == "bf16" else [])]
    flags = segmentation_flags(pairs, tmp_path / "out", *more)
    # the matrices that stretch the table are computed on the host
    check(train(run_segmentation_finetuning.main, flags, dtype), but=["layers/rel_pos_bias.py"])


# ── Variants ──
@pytest.mark.slow
@pytest.mark.parametrize("more", [["--predict", "all"], ["--augment_on_device", "--data_pipeline", "fast"]])
def test_pretraining_for_pixels(more, data, tmp_path, train):
    check(train(run_beitv2_pretraining.main, pixel_flags(data, tmp_path, *SHORT, *more)))


@pytest.mark.parametrize(("opt", "reads"), [("adamw", 0), ("adam", 0), ("sgd", 1), ("lamb", 1)])
def test_a_step_reads_once_at_most(opt, reads, data, tmp_path, train):
    """Whether the gradients are finite: torch's SGD and timm's optimizers do not ask on
    the device.
    """
    flags = finetuning_flags(data, tmp_path, *SHORT, *as_flags(opt=opt, batch_size=8, clip_grad=1.0))
    watched = train(run_class_finetuning.main, flags)
    assert [[note.function for note in notes] for notes in watched.steps[1:]] == [["take_step"] * reads]


@pytest.mark.slow
def test_a_run_resumes_on_the_device(data, tmp_path, train):
    flags = finetuning_flags(data, tmp_path, *as_flags(model_ema=True, batch_size=8))
    train(run_class_finetuning.main, [*flags, *SHORT])
    check(train(run_class_finetuning.main, flags))
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0, 1]


@pytest.mark.slow
def test_commands_that_only_look(ten_photos, data, tokenizer_weight, tmp_path):
    run_class_finetuning.main(finetuning_flags(data, tmp_path, *SHORT))
    trained, weights = tmp_path / "checkpoint.pth", student(tmp_path / "student.pth")
    looks = as_flags(device="cuda", num_workers=0)
    labeled = as_flags(data_set="image_folder", data_path=data, eval_data_path=data)
    more = as_flags(train_pixel_decoder=True, tokenizer_weight=tokenizer_weight, data_path=data)
    more += as_flags(
        output_dir=tmp_path / "pixels", pixel_decoder_depth=1, pixel_decoder_dim=64, batch_size=8
    )
    with cuda_on_paper():
        encode_images.main(encoding_flags(tokenizer_weight, ten_photos, tmp_path / "codes", *looks))
        features = tmp_path / "features.npy"
        extract_features.main([str(weights), str(ten_photos), "--output", str(features), *looks])
        run_linear_eval.main(["--knn", *labeled, *SIZE, *as_flags(finetune=weights), *looks])
        run_class_finetuning.main(["--eval", *labeled[2:], *as_flags(resume=trained), *looks])
        predicted = as_flags(predict=data, resume=trained, output_dir=tmp_path / "predicted")
        run_class_finetuning.main([*predicted, *looks])
        shown = as_flags(checkpoint=weights, image=data / "a/0.jpg", output=tmp_path / "shown.png")
        visualize_attention.main([*shown, "--device", "cuda"])
        run_vqkd_training.main([*more, *SIZE, *SHORT, *as_flags(eval_data_path=data, image_freq=1), *looks])
    codes = np.load(tmp_path / "codes/codes.npy")
    assert codes.max() < 16
    encode_images.main(encoding_flags(tokenizer_weight, ten_photos, tmp_path / "cpu"))
    assert (codes == np.load(tmp_path / "cpu/codes.npy")).all()


# ── The same numbers as on the CPU ──
def test_pretraining_computes_what_the_cpu_computes(data, tokenizer_weight, tmp_path, train):
    more = as_flags(batch_size=8, drop_path=0.1, eval_data_path=data)
    flags = {
        out: pretraining_flags(data, tmp_path / out, tokenizer_weight, *SHORT, *more)
        for out in ("cpu", "cuda")
    }
    run_beitv2_pretraining.main(flags["cpu"])
    train(run_beitv2_pretraining.main, flags["cuda"], "fp32")
    cpu, cuda = (log_lines(tmp_path / out)[0] for out in ("cpu", "cuda"))
    assert cpu.keys() == cuda.keys()
    assert {**cpu, "seconds": 0} == pytest.approx({**cuda, "seconds": 0}, rel=1e-3)


# ── What the paper sees ──
@pytest.fixture
def paper():
    with cuda_on_paper() as paper:
        yield paper


def there(*shape):
    return torch.zeros(shape, device=CUDA)


def test_devices_do_not_mix(paper):
    for mixed in (
        lambda: there(2) + torch.zeros(2),
        lambda: there(2, 2) @ torch.zeros(2, 2),
        lambda: there(2).index_select(0, torch.zeros(1, dtype=torch.int64)),
        lambda: torch.zeros(2)[torch.zeros(2, dtype=torch.int64, device=CUDA)],
        lambda: torch.cat((there(2), torch.zeros(2))),
        lambda: there(2).normal_(generator=torch.Generator()),
    ):
        with pytest.raises(CudaMistake):
            mixed()
    for fine in (there(2) + torch.tensor(1.0), there(2) * 2, there(2).to("cpu") + torch.zeros(2)):
        assert fine.shape == (2,)


def test_reads_and_copies_are_noted_with_their_line(paper):
    x, pinned = there(3), torch.zeros(3).pin_memory()
    for kind, waits in {
        "read": (
            lambda: x.sum().item(),
            lambda: bool(x.any()),
            lambda: x.cpu(),
            lambda: x.tolist(),
            lambda: x.nonzero(),
            lambda: x[x > 0],
            lambda: torch.zeros(3).copy_(x),
            lambda: torch.cuda.synchronize(),
        ),
        "copy": (
            lambda: pinned.to(CUDA),
            lambda: torch.zeros(3).to(CUDA, non_blocking=True),
            lambda: torch.tensor([1, 2], device=CUDA),
            lambda: x[torch.tensor([1])],
            lambda: x.copy_(torch.zeros(3)),
        ),
    }.items():
        for wait in waits:
            with paper.noting() as notes:
                wait()
            assert [note.kind for note in notes] == [kind]
    with paper.noting() as notes:
        pinned.to(CUDA, non_blocking=True)
        x.masked_fill_(x > 0, 1.0)
        torch.where(x > 0, x, 2.0).sum()
    assert notes == []


def test_a_stream_waits_for_what_it_uses(paper):
    copying, computing = torch.cuda.Stream(CUDA), torch.cuda.current_stream(CUDA)
    with torch.cuda.stream(copying):
        x = torch.zeros(3).to(CUDA)
    with pytest.raises(CudaMistake, match="waited"):
        x.sum()
    computing.wait_stream(copying)
    with pytest.raises(CudaMistake, match="record_stream"):
        x.sum()
    x.record_stream(computing)
    x.sum()


def test_autocast_is_that_of_cuda(paper):
    x = there(2, 2).requires_grad_()
    with torch.autocast("cuda", torch.float16):
        product = x @ x
        results = (product, product.softmax(0), product.sum(), product + product, x + product)
        with torch.autocast("cuda", enabled=False):
            assert (x @ x).dtype == torch.float32
    low, single = torch.float16, torch.float32
    assert [y.dtype for y in results] == [low, single, single, low, single]
    product.sum().backward()
    assert (x.grad.dtype, x.grad.device) == (single, CUDA)


def test_nothing_of_it_stays_behind(data, tmp_path, train):
    before = torch.cuda.is_available(), torch.zeros(1).is_pinned(), torch.nn.Linear(1, 1).weight.device
    train(run_class_finetuning.main, finetuning_flags(data, tmp_path, *SHORT, *as_flags(batch_size=16)))
    assert before == (
        torch.cuda.is_available(),
        torch.zeros(1).is_pinned(),
        torch.nn.Linear(1, 1).weight.device,
    )
    run_class_finetuning.main(finetuning_flags(data, tmp_path / "cpu", *SHORT, *as_flags(batch_size=16)))
