"""Rare classes in fine-tuning: their weight in the loss, how often they are drawn, and
which figure chooses the best checkpoint.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from many_processes import two_processes
from refusals import refused, user_reads
from timm.data import Mixup
from tiny_runs import assert_same_weights, checkpoint, finetuning_flags, kill_after, log_lines, photos

import run_class_finetuning
from data_pipeline.samplers import AGAIN, ResumableSampler
from engine_for_finetuning import FinetuningStage, balanced_class_weights
from evaluation.confusion import Confusion
from runtime.device import Precision

CPU = torch.device("cpu")
LABELS = np.array([0] * 40 + [2] * 3 + [1] * 7)  # 50


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory):
    """Ten photos of one class, two of the other."""
    folder = photos(tmp_path_factory.mktemp("imbalanced"), per_class=10)
    for number in range(2, 10):
        (folder / "b" / f"{number}.jpg").unlink()
    return folder


def keys(rank=0, world_size=1, batch_size=10, epoch=0, update_freq=1, done=0):
    sampler = ResumableSampler(50, batch_size, update_freq, rank, world_size, seed=1, labels=LABELS)
    sampler.set_position(epoch, done)
    return list(sampler)


def test_an_epoch_has_every_class_equally_often():
    for epoch in range(3):
        drawn = [key for batch in keys(epoch=epoch) for key in batch]
        assert len(set(drawn)) == 50  # no image twice with the same augmentation
        assert sorted(np.bincount(LABELS[[index for _, index in drawn]])) == [16, 17, 17]
        times = np.bincount([index for _, index in drawn], minlength=50)
        assert times[:40].max() == 1  # of the frequent class different images
        assert set(times[40:43]) <= {5, 6} and set(times[43:]) <= {2, 3}  # of rare ones all, in turn
        assert {when % AGAIN for when, _ in drawn} == {epoch}
    assert keys(epoch=0) == keys(epoch=0) != keys(epoch=1)
    seen = {index for epoch in range(12) for batch in keys(epoch=epoch) for _, index in batch}
    assert seen == set(range(50))


def test_processes_and_micro_steps_share_one_order():
    whole = keys(batch_size=20)
    halves = zip(*(keys(rank, 2) for rank in range(2)), strict=True)
    assert [a + b for a, b in halves] == whole
    in_two = keys(update_freq=2)
    assert [a + b for a, b in zip(in_two[::2], in_two[1::2], strict=True)] == whole
    assert keys(batch_size=10, done=20) == keys(batch_size=10)[2:]


def test_an_image_that_comes_again_is_cropped_anew(imbalanced):
    args = run_class_finetuning.get_parser().parse_args(finetuning_flags(imbalanced, ""))
    dataset, _ = run_class_finetuning.build_dataset(args, train=True)
    first, again, later = (dataset[epoch, 11]["image"] for epoch in (0, AGAIN, 1))
    assert not torch.equal(first, again) and not torch.equal(again, later)
    assert torch.equal(again, dataset[AGAIN, 11]["image"])


def stage(**more):
    return FinetuningStage(CPU, Precision("cpu", None), **more)


def batch(count=12, classes=3):
    return {"image": torch.randn(count, classes), "label": torch.arange(count) % classes}


def test_class_weights_are_1_in_the_mean_over_the_images():
    sizes = torch.tensor([40, 7, 0, 3])
    weights = balanced_class_weights(sizes)
    assert weights.tolist() == pytest.approx([50 / 120, 50 / 21, 0, 50 / 9])
    assert float((weights * sizes).sum()) == pytest.approx(50)
    assert balanced_class_weights(torch.tensor([8, 8])).tolist() == [1, 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_weighted_loss_does_not_depend_on_the_split(smoothing):
    weights = torch.tensor([0.5, 1.0, 3.0])
    model, data = torch.nn.Linear(3, 3).requires_grad_(False), batch()
    weighted = stage(class_weights=weights, smoothing=smoothing)
    whole = weighted.step(model, data)[0]
    parts = [{key: value[rows] for key, value in data.items()} for rows in (slice(0, 6), slice(6, 12))]
    assert float(whole) == pytest.approx(sum(float(weighted.step(model, part)[0]) for part in parts) / 2)
    # every class's negative log-probability weighs as the class
    logs = model(data["image"]).log_softmax(1)
    target = F.one_hot(data["label"], 3) * (1 - smoothing) + smoothing / 3
    assert float(whole) == pytest.approx(float(-(logs * target * weights).sum(1).mean()), rel=1e-5)
    plain = stage(smoothing=smoothing).step(model, data)[0]
    equal = stage(smoothing=smoothing, class_weights=torch.ones(3)).step(model, data)[0]
    assert float(plain) == pytest.approx(float(equal), rel=1e-6)


def test_mixed_labels_are_weighted_too():
    model, data = torch.nn.Linear(3, 3), batch()
    model.forward = lambda images: images.mean((2, 3))
    data["image"] = torch.randn(12, 3, 4, 4)
    mixup = Mixup(mixup_alpha=0.8, num_classes=3, label_smoothing=0.1)

    def loss(weights):
        np.random.seed(0)
        fresh = data | {"image": data["image"].clone()}  # timm mixes in place
        return float(stage(mixup=mixup, class_weights=weights).step(model, fresh)[0])

    assert loss(torch.ones(3)) == pytest.approx(loss(None), rel=1e-6)
    by_class = [loss(row) for row in torch.eye(3)]
    assert loss(torch.tensor([0.5, 1.0, 3.0])) == pytest.approx(
        0.5 * by_class[0] + by_class[1] + 3 * by_class[2]
    )


def test_macro_f1_is_the_mean_of_the_classes():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (300,), generator=generator)
    predictions = torch.where(torch.rand(300, generator=generator) < 0.4, labels, (labels * 3 + 1) % 6)
    confusion = Confusion(CPU)
    for start in range(0, 300, 70):
        confusion.add(labels[start : start + 70], predictions[start : start + 70])
    f1 = []
    for number in sorted({*labels.tolist(), *predictions.tolist()}):
        hit = ((labels == number) & (predictions == number)).sum()
        f1.append(float(2 * hit / ((labels == number).sum() + (predictions == number).sum())))
    assert len(f1) > 4  # a class that is only predicted counts with 0
    assert confusion.macro_f1() == pytest.approx(np.mean(f1))
    assert np.isnan(Confusion(CPU).macro_f1())


@pytest.mark.slow
@pytest.mark.parametrize("more", ["--class_weights balanced", "--balanced_sampler"])
def test_a_killed_run_goes_on_bit_for_bit(more, imbalanced, tmp_path, monkeypatch):
    flags = [*more.split(), "--save_ckpt_steps", "1", "--best_metric", "balanced_acc"]
    run_class_finetuning.main(finetuning_flags(imbalanced, tmp_path / "whole", *flags))
    with monkeypatch.context() as patch:
        kill_after(4, patch)  # of 3 steps per epoch
        with pytest.raises(KeyboardInterrupt):
            run_class_finetuning.main(finetuning_flags(imbalanced, tmp_path / "killed", *flags))
    run_class_finetuning.main(finetuning_flags(imbalanced, tmp_path / "killed", *flags))
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "killed/checkpoint.pth")
    lines = log_lines(tmp_path / "killed")
    best = checkpoint(tmp_path / "killed/checkpoint-best.pth")
    assert best["best"] == max(line["test_balanced_acc"] for line in lines)
    assert all(0 <= line["test_f1"] <= 100 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["--class_weights balanced", "--balanced_sampler"])
def test_two_processes_learn_what_one_learns(more, imbalanced, tmp_path):
    # --aa none and the like: what a step draws depends on the rank
    flags = [*more.split(), "--aa", "none", "--color_jitter", "0", "--drop_path", "0", "--eval_freq", "9"]
    two_processes(
        "run_class_finetuning.py", finetuning_flags(imbalanced, tmp_path / "two", *flags, "--batch_size", "2")
    )
    run_class_finetuning.main(finetuning_flags(imbalanced, tmp_path / "one", *flags))
    for two, one in zip(log_lines(tmp_path / "two"), log_lines(tmp_path / "one"), strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    two, one = log_lines(tmp_path / "two")[-1], log_lines(tmp_path / "one")[-1]
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-3)


def test_the_best_is_of_one_figure_throughout():
    by_f1 = stage(best="f1")
    assert by_f1.best_metric({"test_f1": 3.0, "test_acc1": 9.0}) == 3.0
    assert stage().best_metric({"test_f1": 3.0, "test_acc1": 9.0}) == 9.0
    by_f1.load_state_dict(by_f1.state_dict())
    with user_reads("chosen by acc1, .* give --best_metric acc1"):
        by_f1.load_state_dict(stage().state_dict())
    with user_reads("chosen by f1, .* give --best_metric f1"):
        stage().load_state_dict(by_f1.state_dict())


def test_both_ways_at_once_are_refused(data, capsys):
    more = ["--class_weights", "balanced", "--balanced_sampler"]
    said = refused(run_class_finetuning.main, finetuning_flags(data, "", *more), capsys)
    assert "--class_weights balanced and --balanced_sampler both make up for rare classes" in said
