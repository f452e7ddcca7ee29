"""Counts of labels and answers, and ImageNet's names for its classes."""

import pytest
import torch
from many_processes import run_ranks
from tiny_classifier import timms_table

from data_pipeline import imagenet_classes
from errors import UserError
from evaluation import confusion
from evaluation.confident_errors import ConfidentErrors
from evaluation.confusion import Confusion, WorstClass, describe_worst, format_worst
from visualization import drawing

CPU = torch.device("cpu")
# Class 0: 4 images, one right, two taken for 2, one for 1; class 1: always right; class
# 2: 2 images, both taken for 0.
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
ANSWERS = torch.tensor([0, 2, 1, 2, 1, 1, 1, 0, 0])


def dense(confusion: Confusion, classes: int) -> torch.Tensor:
    """(classes, classes): row = true class, column = predicted class."""
    labels, predictions, counts = confusion.pairs()
    return counts.new_zeros(classes, classes).index_put_((labels, predictions), counts)


@pytest.mark.parametrize("pending", [1, 4, 1000])
def test_confusion_by_hand(pending, monkeypatch):
    monkeypatch.setattr(confusion, "PENDING", pending)
    counts = Confusion(CPU)
    for start in (0, 3, 6):
        counts.add(LABELS[start : start + 3], ANSWERS[start : start + 3])
    assert dense(counts, 4).tolist() == [[1, 1, 2, 0], [0, 3, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]
    correct, total = counts.by_class()  # the class without images is not among them
    assert correct.tolist() == [1, 3, 0]
    assert total.tolist() == [4, 3, 2]
    assert counts.worst(2) == [WorstClass(2, 2, 0, 0, 2), WorstClass(0, 4, 1, 2, 2)]
    assert counts.worst(9)[2] == WorstClass(1, 3, 3)


def test_ties_of_recall_go_by_images_and_of_answers_by_number():
    counts = Confusion(CPU)
    counts.add(torch.tensor([0, 1, 1, 2]), torch.tensor([2, 2, 0, 1]))
    assert counts.worst(3) == [
        WorstClass(1, 2, 0, 0, 1),
        WorstClass(0, 1, 0, 2, 1),
        WorstClass(2, 1, 0, 1, 1),
    ]


def test_the_table_names_classes_in_words():
    counts = Confusion(CPU)
    counts.add(LABELS, ANSWERS)
    lines = describe_worst(counts.worst(3), ["n01440764", "cat", "n99999999"])
    assert lines[1] == {
        "class": "n01440764",
        "name": "tench",
        "recall": 25.0,
        "images": 4,
        "taken_for": {"class": "n99999999", "name": "n99999999", "share": 50.0},
    }
    assert format_worst(lines) == [
        "class            recall  images  most often taken for",
        "n99999999          0.0%       2  n01440764 tench (100.0%)",
        "n01440764 tench   25.0%       4  n99999999 (50.0%)",
        "cat              100.0%       3  -",
    ]


def test_counts_of_many_classes_take_memory_for_the_pairs_alone():
    counts = Confusion(CPU)
    labels, answers = torch.randint(21841, (2, 5000))
    counts.add(labels, answers)
    first, second, number = counts.pairs()
    assert len(first) <= 5000
    assert int(number.sum()) == 5000
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == set(
        zip(labels.tolist(), answers.tolist(), strict=True)
    )


def _share(rank, world_size):
    both, first_alone = Confusion(CPU), Confusion(CPU)
    mine = slice(0, 3) if rank == 0 else slice(3, 9)
    both.add(LABELS[mine], ANSWERS[mine])
    if rank == 0:  # the other process has no images
        first_alone.add(LABELS, ANSWERS)
    both.sum_over_ranks()
    first_alone.sum_over_ranks()
    return torch.stack((dense(both, 3), dense(first_alone, 3)))


@pytest.mark.slow
def test_two_processes_count_as_one_also_where_one_has_no_images():
    for counts in run_ranks(_share, 2):
        assert counts.tolist() == [[[1, 1, 2], [0, 3, 0], [2, 0, 0]]] * 2


@pytest.mark.parametrize("letter", ["a", "r"])
def test_the_200_logits_are_those_of_timms_table(letter):
    folders = timms_table(f"imagenet_{letter}_synsets")
    robust = imagenet_classes.robust_set(f"imagenet_{letter}")
    assert imagenet_classes.logits_of(folders, robust, "") == [
        int(n) for n in timms_table(f"imagenet_{letter}_indices")
    ]


def test_imagenets_list():
    synsets = imagenet_classes.synsets()
    assert len(set(synsets)) == 1000
    assert synsets == sorted(synsets)  # what sorting the class folders gives
    assert imagenet_classes.logits_of(synsets, imagenet_classes.robust_set("sketch"), "") == list(range(1000))
    assert imagenet_classes.in_words("n01484850") == "great white shark"
    assert imagenet_classes.in_words("n00004475") == "organism"  # of ImageNet-21k alone
    assert imagenet_classes.in_words("n00000000") == "n00000000"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("imagenet_a", "ImageNet-A"),
        ("ImageNet-A", "ImageNet-A"),
        ("imagenet-r", "ImageNet-R"),
        ("IMAGENET_R", "ImageNet-R"),
        ("sketch", "ImageNet-Sketch"),
        ("imagenet_sketch", "ImageNet-Sketch"),
    ],
)
def test_spellings(text, name):
    assert imagenet_classes.robust_set(text).name == name


def test_other_names_are_told_the_three():
    with pytest.raises(UserError, match="imagenet_v2: give ImageNet-A, ImageNet-R or ImageNet-Sketch"):
        imagenet_classes.robust_set("imagenet_v2")


def test_the_most_confident_errors_are_kept(monkeypatch):
    """Those of a sort over all images, whatever the batches."""
    logits, labels = 3 * torch.randn(40, 3), torch.randint(3, (40,))
    images = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 3, 20, 20) / 40
    errors = ConfidentErrors(count=5)
    for batch in torch.arange(40).split(7):
        errors.add(images[batch], labels[batch], logits[batch])
    probability, predicted = logits.softmax(1).max(1)
    expected = sorted(torch.where(predicted != labels)[0].tolist(), key=lambda i: -probability[i])[:5]
    assert (errors.images[:, 0, 0, 0] * 40).round().int().tolist() == expected

    captions, add_caption = [], drawing.add_caption
    monkeypatch.setattr(
        drawing,
        "add_caption",
        lambda picture, text, *more: captions.append(text) or add_caption(picture, text, *more),
    )
    errors.draw(["cat", "dog"], ((0.5,) * 3, (0.5,) * 3))
    first = expected[0]
    names = ["cat", "dog", "class 2"]
    assert captions[0] == f"as {names[predicted[first]]} {100 * probability[first]:.0f}%"
    assert captions[1] == names[labels[first]]
    assert len(captions) == 11


def test_without_errors_there_is_no_picture():
    errors = ConfidentErrors()
    assert errors.draw([], ((0.5,), (0.5,))) is None
    errors.add(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), torch.eye(2))
    assert errors.draw([], ((0.5,), (0.5,))) is None
