"""ImageNet-1k's classes: their WordNet ids in the order of the logits, their names, and
the test sets that share them.

timm ships the ids and WordNet's words for them; nothing is listed by hand here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from timm.data import ImageNetInfo

from errors import UserError


class RobustSet(NamedTuple):
    """A set of other images of ImageNet's classes, in one folder per class, named by
    its WordNet id.
    """

    name: str
    classes: int


SKETCH = RobustSet("ImageNet-Sketch", 1000)
ROBUST_SETS = {
    "imagenet-a": RobustSet("ImageNet-A", 200),
    "imagenet-r": RobustSet("ImageNet-R", 200),
    "imagenet-sketch": SKETCH,
    "sketch": SKETCH,
}


def robust_set(name: str) -> RobustSet:
    """What `robust_test` names: imagenet_a, ImageNet-R, sketch, ..."""
    found = ROBUST_SETS.get(name.lower().replace("_", "-"))
    if found is None:
        raise UserError(f"`robust_test` {name}: give ImageNet-A, ImageNet-R or ImageNet-Sketch")
    return found


@functools.cache
def _info() -> ImageNetInfo:
    return ImageNetInfo("imagenet-1k")


def synsets() -> list[str]:
    """The 1000 WordNet ids (n01440764, ...) in the order of a classifier's logits,
    which is theirs as text.
    """
    return list(_info().label_names())


def in_words(name: str) -> str:
    """The first of WordNet's words for an id of ImageNet-1k or -21k (n01440764: tench);
    any other name as it is.
    """
    if not re.fullmatch(r"n\d{8}", name):
        return name
    try:
        return _info().label_name_to_description(name).split(",")[0]
    except KeyError:
        return name


def logits_of(folders: Sequence[str], robust: RobustSet, where: str) -> list[int]:
    """Which of the 1000 logits the class folders of a test set stand for, in the
    folders' order. `where`: flag and folder.
    """
    number = {synset: index for index, synset in enumerate(synsets())}
    unknown = [folder for folder in folders if folder not in number]
    if unknown:
        raise UserError(
            f"{where}: class folder '{unknown[0]}' is none of ImageNet-1k's WordNet ids such as n01440764 "
            f"({len(unknown)} of {len(folders)} folders are none); give the folder in which {robust.name}'s "
            "class folders lie"
        )
    if len(folders) != robust.classes:
        raise UserError(
            f"{where}: has {len(folders)} class folders and {robust.name} has {robust.classes}; complete "
            "the folder or correct `robust_test`, because accuracies among other classes do not compare"
        )
    return [number[folder] for folder in folders]
