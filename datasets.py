"""Data sets: what a sample is, and what happens when one does not decode. Where images
are: data_pipeline/image_lists.py.

Everything random in a sample derives from (seed, epoch, index), so that neither the
number of workers nor a resumed run changes what a sample looks like. A sample is a
dictionary: the view's tensors (transforms.py), `label` (int, when there is one) and
`failed` (files that did not decode, each with the reason).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipeline import shards
from data_pipeline.image_lists import (
    Samples,
    class_balanced_share,
    class_folders,
    find_cifar,
    find_classes_folder,
    find_images,
    find_shards,
    read_class_index,
    refuse_one_class,
)
from data_pipeline.samplers import Files
from errors import UserError, pick
from masking_generator import MASK_TYPES, MaskingGenerator, scaled_mask_count, scaled_min_block
from transforms import (
    PretrainingViews,
    Source,
    TokenizerViews,
    View,
    eval_view,
    finetuning_view,
    load_image,
    normalization,
)

DATA_SETS = dict.fromkeys(("image_folder", "IMNET", "CIFAR", "webdataset"))


class ImageFiles(Files):
    """Labeled or unlabeled images (samplers.Files); see the module for what comes back. A
    replaced file brings its label.

    A view with `read`, `pack` and `finish` (transforms.Crops) reads the files itself;
    its samples are packed, as they travel to the device, and `finish` makes of a batch
    of them what the network takes.
    """

    def __init__(
        self, samples: Samples, transform: View, seed: int = 0, classes: Sequence[str] | None = None
    ) -> None:
        self.sources: Any
        self.labels: np.ndarray | None
        self.shard_sizes: list[int] | None = None  # images of each shard, which are read together
        if isinstance(samples, shards.Members):
            self.sources, self.labels, self.shard_sizes = samples, samples.labels, samples.sizes()
        else:
            sources = [source for source, _ in samples]
            # One array of bytes: the reference counts of a million strings would copy
            # them into every worker process.
            paths = [os.fsencode(source) for source in sources if isinstance(source, str)]
            self.sources = np.array(paths) if paths else sources
            labels = [label for _, label in samples if label is not None]
            self.labels = np.array(labels, dtype=np.int64) if labels else None
        super().__init__(len(self.sources), seed)
        self.transform, self.classes = transform, classes
        self.warn_of_12_bits()

    def source(self, index: int) -> Source | shards.Member:
        if isinstance(self.sources, shards.Members):
            return self.sources.member(index)
        source = self.sources[index]
        return os.fsdecode(source) if isinstance(source, bytes) else source

    def name(self, place: int) -> str:
        return str(self.source(place))

    def identities(self) -> Iterator[bytes]:
        if isinstance(self.sources, shards.Members):  # names would be read from the shards
            yield from (os.fsencode(os.path.basename(path)) for path in self.sources.paths)
            yield from (self.sources.shard.tobytes(), self.sources.places.tobytes())
        else:
            yield from (source if isinstance(source, bytes) else source.tobytes() for source in self.sources)
        if self.labels is not None:
            yield self.labels.tobytes()

    def read(self, place: int) -> Any:
        read = getattr(self.transform, "read", load_image)
        return read(self.open(place))

    def open(self, place: int) -> Any:
        """File `place`, for open_image; an image in memory as it is."""
        source = self.source(place)
        return source.read() if isinstance(source, shards.Member) else source

    def sample(self, place: int, image: Any) -> dict[str, Any]:
        label = {} if self.labels is None else {"label": int(self.labels[place])}
        return {**getattr(self.transform, "pack", self.transform)(image), **label}

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of samples, on the device, as the network takes it."""
        finish = getattr(self.transform, "finish", None)
        return finish(batch) if finish else batch


# --------------------------------------------------------------------------------------------------------
#   builders
def build_pretraining_dataset(
    args: Any, grid: int, held_out: str = "", tokenizer_stride: int | None = 16
) -> ImageFiles:
    """Unlabeled images with the two views and a mask of a grid x grid patch grid (PretrainingViews).

    `held_out`: a folder (--eval_data_path) whose images are read instead, the same way.
    `tokenizer_stride`: pixels of the tokenizer's view for each patch, where
    --second_input_size is not given; None: there is no such view.
    """
    mean, std = normalization(args.imagenet_default_mean_and_std)
    views = PretrainingViews(
        args.input_size,
        None if tokenizer_stride is None else args.second_input_size or grid * tokenizer_stride,
        args.min_crop_scale,
        args.color_jitter,
        args.train_interpolation,
        args.second_interpolation,
        mean,
        std,
        build_masks(args, grid),
        args.vflip,
        args.data_pipeline,
        args.augment_on_device,
    )
    if held_out:
        find = find_shards if args.data_set == "webdataset" else find_images
        samples = without_labels(find(held_out, "--eval_data_path")[0])
    else:
        samples = _unlabeled(args, train=True)
    return ImageFiles(samples, views, args.seed)


def build_masks(args: Any, grid: int) -> MaskingGenerator:
    """The masks that the flags ask for; empty ones with --no_mask."""
    count = scaled_mask_count(grid) if args.num_mask_patches is None else args.num_mask_patches
    smallest = args.min_mask_patches_per_block
    smallest = scaled_min_block(grid) if smallest is None else smallest
    largest = args.max_mask_patches_per_block
    if args.mask_type == "block" and not args.no_mask and largest is not None and 0 <= largest < smallest:
        raise UserError(
            f"--max_mask_patches_per_block {largest} is below --min_mask_patches_per_block "
            f"{smallest}: give the smallest "
            "block and a larger one"
        )
    generator = MASK_TYPES[args.mask_type]
    try:
        return generator(grid, 0 if args.no_mask else count, smallest, largest)
    except ValueError as error:
        raise UserError(f"--min_mask_patches_per_block, --max_mask_patches_per_block: {error}") from None


def build_vqkd_dataset(args: Any) -> ImageFiles:
    """Unlabeled images in [0, 1]: crops and flips."""
    view = TokenizerViews(
        args.input_size,
        args.min_crop_scale,
        args.color_jitter,
        args.train_interpolation,
        args.vflip,
        args.data_pipeline,
        args.augment_on_device,
    )
    return ImageFiles(_unlabeled(args, train=True), view, args.seed)


def build_held_out_dataset(args: Any) -> ImageFiles | None:
    """Unlabeled images in [0, 1], center crops: --eval_data_path, or the data set's own
    split; None without either.
    """
    if args.data_set in ("image_folder", "webdataset") and not args.eval_data_path:
        return None
    return ImageFiles(_unlabeled(args, train=False), eval_view(args.input_size), args.seed)


def build_finetuning_dataset(
    args: Any,
    train: bool,
    own_classes: bool = False,
    classes: Sequence[str] | None = None,
    augment: bool = True,
) -> tuple[ImageFiles, int]:
    """Labeled images and the number of classes, which must be --nb_classes unless that is 0.

    The validation split takes its label numbers from the training split's class names;
    with `own_classes` from its own folders (ImageNet-A and -R: 200 of the model's 1000,
    so --nb_classes is not compared). `classes`: the names and order that a finished
    model was trained with, so that the training split need not be there. `augment`
    False: the training images as validation sees them.
    """
    samples, classes = _labeled(args, train, own_classes, classes)
    refuse_one_class(classes, "--data_path" if train else "--eval_data_path")
    if args.nb_classes not in (0, len(classes)) and not own_classes:
        raise UserError(
            f"--nb_classes {args.nb_classes}: the data has {len(classes)} classes; correct one of "
            "them, or leave "
            "--nb_classes out to take the number from the data"
        )
    mean, std = normalization(args.imagenet_default_mean_and_std)
    if train:  # Not args.seed: runs that differ in the seed alone are compared on the same labels.
        samples = class_balanced_share(samples, args.label_fraction, seed=0)
    if not train or not augment:
        view = eval_view(args.input_size, args.crop_pct, mean=mean, std=std)
        return ImageFiles(samples, view, args.seed, classes), len(classes)
    view = finetuning_view(
        args.input_size,
        mean,
        std,
        aa=args.aa,
        color_jitter=args.color_jitter,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
        interpolation=args.train_interpolation,
        min_crop_scale=args.min_crop_scale,
        vflip=args.vflip,
    )
    return ImageFiles(samples, view, args.seed, classes), len(classes)


def build_knn_datasets(args: Any) -> tuple[ImageFiles, ImageFiles, int]:
    """Labeled images of --knn_data_path in center crops: those of train/, those of val/,
    and the number of classes.
    """
    folder = args.knn_data_path
    if not all(os.path.isdir(os.path.join(folder, split)) for split in ("train", "val")):
        raise UserError(
            f"--knn_data_path {folder}: a folder that holds train/ and val/, each with "
            "class folders, is expected"
        )
    train, classes = find_classes_folder(os.path.join(folder, "train"), "--knn_data_path")
    validation, _ = find_classes_folder(os.path.join(folder, "val"), "--knn_data_path", classes)
    refuse_one_class(classes, "--knn_data_path")
    mean, std = normalization(args.imagenet_default_mean_and_std)
    view = eval_view(args.input_size, mean=mean, std=std)
    return (
        ImageFiles(train, view, args.seed, classes),
        ImageFiles(validation, view, args.seed, classes),
        len(classes),
    )


def _split_folder(args: Any, train: bool) -> tuple[str, str]:
    """(folder of the split, the flag that says so); the folder is '' when no flag says where the split is."""
    pick(DATA_SETS, args.data_set, "--data_set")
    if args.data_set == "webdataset" and getattr(args, "image_folder_class_index_file", None):
        raise UserError(
            "--image_folder_class_index_file lists files of a folder; shards say themselves what is in them"
        )
    if train:
        return (
            os.path.join(args.data_path, "train") if args.data_set == "IMNET" else args.data_path
        ), "--data_path"
    if args.eval_data_path or args.data_set != "IMNET":
        return args.eval_data_path or "", "--eval_data_path"
    return os.path.join(args.data_path, "val"), "--data_path"


def _unlabeled(args: Any, train: bool) -> Samples:
    folder, flag = _split_folder(args, train)
    index = getattr(args, "image_folder_class_index_file", None)  # the published flag of fine-tuning alone
    samples: Samples
    if args.data_set == "CIFAR":
        samples = find_cifar(args.data_path, train, args.download)[0]
    elif args.data_set == "webdataset":
        samples = find_shards(folder, flag)[0]
    elif train and index:
        samples = read_class_index(index, folder, flag)[0]
    else:
        samples = find_images(folder, flag)[0]
    return without_labels(samples)


def without_labels(samples: Samples) -> Samples:
    if isinstance(samples, shards.Members):
        return samples.with_labels(None)
    return [(source, None) for source, _ in samples]


def _labeled(
    args: Any, train: bool, own_classes: bool, classes: Sequence[str] | None = None
) -> tuple[Samples, Sequence[str]]:
    folder, flag = _split_folder(args, train)
    index = args.image_folder_class_index_file
    if args.data_set == "CIFAR":
        return find_cifar(args.data_path, train, args.download)
    if args.data_set == "webdataset":
        return _labeled_shards(args, train, own_classes, classes)
    if train:
        return read_class_index(index, folder, flag) if index else find_classes_folder(folder, flag)
    if not folder:
        raise UserError(
            "--eval_data_path is missing: name the validation folder, or --disable_eval_during_finetuning"
        )
    if own_classes or classes or not args.data_path:  # absent when only evaluating a finished model
        return find_classes_folder(folder, flag, classes)
    training_folder, training_flag = _split_folder(args, train=True)
    if index:
        classes = read_class_index(index, training_folder, training_flag)[1]
    elif os.path.isdir(training_folder):
        classes = class_folders(training_folder)
    return find_classes_folder(folder, flag, classes)


def _labeled_shards(
    args: Any, train: bool, own_classes: bool, classes: Sequence[str] | None
) -> tuple[shards.Members, Sequence[str]]:
    """As for folders; the validation shards take their names from the training shards'."""
    folder, flag = _split_folder(args, train)
    if not folder:
        raise UserError(
            "--eval_data_path is missing: name the validation shards, or --disable_eval_during_finetuning"
        )
    if not train and classes is None and not own_classes and args.data_path:
        classes = find_shards(*_split_folder(args, train=True))[1]
    members, names = find_shards(folder, flag, classes)
    if names is None:
        raise UserError(
            f"{flag} {folder}: these shards have no labels; scripts/make_shards.py --classes writes "
            "them (as .cls) from one "
            "folder a class"
        )
    numbers = names == [str(number) for number in range(len(names))]  # no classes.txt
    if train and numbers and len(names) > len(members) and not getattr(args, "nb_classes", 0):
        raise UserError(
            f"{flag} {folder}: a label is {len(names) - 1}, but there are {len(members)} images, and "
            "no classes.txt names so "
            "many classes: write one, give --nb_classes, or mend the label"
        )
    return members, names
