"""Data sets of images: where the images of a run are, and their labels.

Everything random in a sample derives from (seed, epoch, index), so that neither the
number of workers nor a resumed run changes what a sample looks like. A sample is a
dictionary: the view's tensors (transforms.py), `label` (int, when there is one),
`index`, and `failed` (files that did not decode, each with the reason).
data_pipeline/files.py follows an image from its path to the device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from data_pipeline import shards
from data_pipeline.files import Files, View
from data_pipeline.folders import ImagePaths, list_class_folders, refuse_one_class, warn_of_training_images
from data_pipeline.image_formats import EXTENSIONS, Source
from data_pipeline.image_lists import (
    Samples,
    find_cifar,
    find_classes_folder,
    find_images,
    find_shards,
    read_class_index,
    take_class_balanced_share,
)
from data_pipeline.samplers import evenly_spaced
from errors import ParameterError, UserError, pick

DATA_SETS = dict.fromkeys(("image_folder", "IMNET", "CIFAR", "webdataset"))


class ImageFiles(Files):
    """Labeled or unlabeled images. A replaced file brings its label."""

    def __init__(
        self, samples: Samples, view: View, seed: int = 0, classes: Sequence[str] | None = None
    ) -> None:
        self.sources: Any
        self.labels: np.ndarray | None
        if isinstance(samples, shards.Members):
            self.sources, self.labels, self.shard_sizes = samples, samples.labels, samples.count_by_shard()
        elif isinstance(samples, ImagePaths):
            self.sources, self.labels = samples, samples.labels
        else:
            labels = [label for _, label in samples if label is not None]
            self.labels = np.array(labels, dtype=np.int64) if labels else None
            sources = [source for source, _ in samples]
            paths = [source for source in sources if isinstance(source, str)]
            self.sources = ImagePaths.of(paths) if paths else sources
        super().__init__(len(self.sources), view, seed)
        self.classes = classes
        self.warn_of_12_bits(self.open)

    def source(self, index: int) -> Source | shards.Member:
        if isinstance(self.sources, shards.Members):
            return self.sources.member(index)
        return self.sources[index][0] if isinstance(self.sources, ImagePaths) else self.sources[index]

    def name(self, index: int) -> str:
        return str(self.source(index))

    def identities(self) -> Iterator[bytes]:
        if isinstance(self.sources, shards.Members):  # names would be read from the shards
            yield from (os.fsencode(os.path.basename(path)) for path in self.sources.paths)
            yield from (self.sources.shard.tobytes(), self.sources.places.tobytes())
        elif isinstance(self.sources, ImagePaths):
            yield from self.sources.iterate_encoded()
        else:
            yield from (source.tobytes() for source in self.sources)
        if self.labels is not None:
            yield self.labels.tobytes()

    def open(self, index: int) -> Any:
        """A path, the bytes of a shard's member, or an image in memory as it is."""
        source = self.source(index)
        return source.read() if isinstance(source, shards.Member) else source

    def sample(self, index: int, loaded: Any) -> dict[str, Any]:
        label = {} if self.labels is None else {"label": int(self.labels[index])}
        return {**super().sample(index, loaded), **label}


def open_evenly(samples: Samples, count: int) -> Iterator[Source | IO[bytes]]:
    """Up to `count` of the images, evenly spread, as data_pipeline.pixel_format reads
    them: of packed shards the same ones as of their folder.
    """
    if isinstance(samples, shards.Members):
        samples = samples.in_folder_order()
    for index in evenly_spaced(len(samples), count):
        source = samples[index][0]
        if not isinstance(source, shards.Member):
            yield source
            continue
        with contextlib.suppress(OSError):  # which is reported when the image is needed
            file = source.read()
            file.name = str(source)
            yield file


# ── Where the images of a run are ──


@dataclass(frozen=True)
class ImageSource:
    """Training images in `data_path`, validation images in `eval_data_path`, '' where
    there are none.

    `data_set`: image_folder (folders), IMNET (train/ and, without `eval_data_path`,
    val/ below `data_path`), CIFAR (CIFAR-100, fetched with `download`), webdataset (tar
    shards). `image_folder_class_index_file`: JSON lines that list the training images
    (image_lists.read_class_index).
    """

    data_path: str
    eval_data_path: str = ""
    data_set: str = "image_folder"
    image_folder_class_index_file: str | None = None
    download: bool = False
    endings: tuple[str, ...] = EXTENSIONS  # of the names of images

    def folder(self, train: bool) -> tuple[str, str]:
        """(folder of the split, the parameter that says so); the folder is '' where
        none does.
        """
        pick(DATA_SETS, self.data_set, "`data_set`")
        if self.data_set == "webdataset" and self.image_folder_class_index_file:
            raise ParameterError(
                "`image_folder_class_index_file` lists files of a folder; shards say themselves what is in "
                "them"
            )
        if train:
            imnet = self.data_set == "IMNET"
            return os.path.join(self.data_path, "train") if imnet else self.data_path, "`data_path`"
        if self.eval_data_path or self.data_set != "IMNET":
            return self.eval_data_path or "", "`eval_data_path`"
        return os.path.join(self.data_path, "val"), "`data_path`"


def find_unlabeled(source: ImageSource, train: bool) -> Samples:
    """The images of a split, without their labels."""
    folder, origin = source.folder(train)
    if not train:
        warn_of_training_images(source.data_path and source.folder(train=True)[0], folder)
    samples: Samples
    if source.data_set == "CIFAR":
        samples = find_cifar(source.data_path, train, source.download)[0]
    elif source.data_set == "webdataset":
        samples = find_shards(folder, origin, endings=source.endings)[0]
    elif train and source.image_folder_class_index_file:
        samples = read_class_index(source.image_folder_class_index_file, folder, origin)[0]
    else:
        samples = find_images(folder, origin, source.endings)[0]
    return without_labels(samples)


def find_held_out(source: ImageSource) -> Samples:
    """The images of `eval_data_path` without their labels, however nested and whatever
    else `data_set` says, except for shards.
    """
    warn_of_training_images(source.data_path, source.eval_data_path)
    find = find_shards if source.data_set == "webdataset" else find_images
    return without_labels(find(source.eval_data_path, "`eval_data_path`", endings=source.endings)[0])


def without_labels(samples: Samples) -> Samples:
    if isinstance(samples, (shards.Members, ImagePaths)):
        return samples.with_labels(None)
    return [(source, None) for source, _ in samples]


def find_labeled(
    source: ImageSource,
    train: bool,
    nb_classes: int = 0,
    own_classes: bool = False,
    classes: Sequence[str] | None = None,
) -> tuple[Samples, Sequence[str]]:
    """The images of a split with their labels, and the names of the classes, of which
    there must be `nb_classes` unless that is 0.

    The validation split takes its label numbers from the training split's class names;
    with `own_classes` from its own folders (ImageNet-A and -R: 200 of the model's 1000,
    so that `nb_classes` is not compared). `classes`: the names and order that a
    finished model was trained with, so that the training split need not be there.
    """
    samples: Samples
    if source.data_set == "webdataset":
        samples, names = _find_labeled_shards(source, train, nb_classes, own_classes, classes)
    else:
        samples, names = _find_labeled_files(source, train, own_classes, classes)
    if not train and source.data_path:  # absent when only evaluating a finished model
        warn_of_training_images(source.folder(train=True)[0], source.folder(train=False)[0])
    refuse_one_class(names, "`data_path`" if train else "`eval_data_path`")
    if nb_classes not in (0, len(names)) and not own_classes:
        raise ParameterError(
            f"`nb_classes` {nb_classes}: the data has {len(names)} classes; correct one of them, or leave "
            "`nb_classes` out to take the number from the data"
        )
    return samples, names


def _find_labeled_files(
    source: ImageSource, train: bool, own_classes: bool, classes: Sequence[str] | None
) -> tuple[Samples, Sequence[str]]:
    folder, origin = source.folder(train)
    index, endings = source.image_folder_class_index_file, source.endings
    if source.data_set == "CIFAR":
        return find_cifar(source.data_path, train, source.download)
    if train:
        if index:
            return read_class_index(index, folder, origin)
        return find_classes_folder(folder, origin, endings=endings)
    if not folder:
        raise ParameterError(
            "`eval_data_path` is missing: name the validation folder, or `disable_eval_during_finetuning`"
        )
    if own_classes or classes or not source.data_path:  # absent when only evaluating a finished model
        return find_classes_folder(folder, origin, classes, endings)
    training_folder, training_origin = source.folder(train=True)
    if index:
        classes = read_class_index(index, training_folder, training_origin)[1]
    elif os.path.isdir(training_folder):
        classes = list_class_folders(training_folder)
    return find_classes_folder(folder, origin, classes, endings)


def _find_labeled_shards(
    source: ImageSource, train: bool, nb_classes: int, own_classes: bool, classes: Sequence[str] | None
) -> tuple[shards.Members, Sequence[str]]:
    """As for folders; the validation shards take their names from the training
    shards'.
    """
    folder, origin = source.folder(train)
    if not folder:
        raise ParameterError(
            "`eval_data_path` is missing: name the validation shards, or `disable_eval_during_finetuning`"
        )
    if not train and classes is None and not own_classes and source.data_path:
        classes = find_shards(*source.folder(train=True), endings=source.endings)[1]
    members, names = find_shards(folder, origin, classes, source.endings)
    if names is None:
        raise UserError(
            f"{origin} {folder}: these shards have no labels; scripts/make_shards.py --classes writes them "
            "(as .cls) from one folder per class"
        )
    numbers = names == [str(number) for number in range(len(names))]  # no classes.txt
    if train and numbers and len(names) > len(members) and not nb_classes:
        raise UserError(
            f"{origin} {folder}: a label is {len(names) - 1}, but there are {len(members)} images, and no "
            "classes.txt names that many classes: write one, give `nb_classes`, or mend the label"
        )
    return members, names


def build_labeled_dataset(
    source: ImageSource,
    view: View,
    train: bool,
    nb_classes: int = 0,
    label_fraction: float = 1.0,
    seed: int = 0,
    own_classes: bool = False,
    classes: Sequence[str] | None = None,
) -> tuple[ImageFiles, int]:
    """Labeled images and the number of classes (find_labeled); of the training images
    `label_fraction`, class by class.
    """
    samples, names = find_labeled(source, train, nb_classes, own_classes, classes)
    if train:  # Not `seed`: runs that differ in the seed alone are compared on the same labels.
        samples = take_class_balanced_share(samples, label_fraction, seed=0)
    return ImageFiles(samples, view, seed, names), len(names)


def build_knn_datasets(
    folder: str, view: View, seed: int, endings: tuple[str, ...] = EXTENSIONS
) -> tuple[ImageFiles, ImageFiles, int]:
    """Labeled images: those of train/ and those of val/ in `folder`, and the number of
    classes.
    """
    origin = "`knn_data_path`"
    if not all(os.path.isdir(os.path.join(folder, split)) for split in ("train", "val")):
        raise UserError(
            f"{origin} {folder}: a folder that holds train/ and val/, each with class folders, is expected"
        )
    train, classes = find_classes_folder(os.path.join(folder, "train"), origin, endings=endings)
    validation, _ = find_classes_folder(os.path.join(folder, "val"), origin, classes, endings)
    refuse_one_class(classes, origin)
    return (
        ImageFiles(train, view, seed, classes),
        ImageFiles(validation, view, seed, classes),
        len(classes),
    )
