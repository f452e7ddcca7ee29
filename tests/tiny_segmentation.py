"""Tiny pairs of image and mask, and the settings of their data sets."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from run_segmentation_finetuning import build_dataset, class_settings
from segmentation.classes import find_classes

CLASSES = ["sky", "grass", "sun", "house"]
# of the labels, in images
COLORS = np.array([[40, 80, 220], [60, 200, 40], [230, 210, 40], [180, 40, 30]], np.uint8)


def segmentation_args(root, **changed):
    flags: dict[str, Any] = {
        "data_path": str(root),
        "eval_data_path": "",
        "input_size": 64,
        "base_size": None,
        "nb_classes": 0,
        "class_names": None,
        "palette": None,
        "reduce_zero_label": False,
        "max_class_share": 0.75,
        "scale_range": [0.5, 2.0],
        "hflip": 0.5,
        "photometric": True,
        "imagenet_default_mean_and_std": False,
        "in_chans": 3,
        "image_range": None,
        "mean_std": None,
        "seed": 0,
    }
    return Namespace(**{**flags, **changed})


def read_classes(args, pairs):
    return find_classes(class_settings(args), pairs)


def scene(seed=0, size=(120, 80)):
    """Labels (height, width): sky over grass, a sun and a house somewhere."""
    rng = np.random.RandomState(seed)
    down, across = np.mgrid[: size[1], : size[0]]
    labels = (down > size[1] * rng.uniform(0.4, 0.7)).astype(np.uint8)
    labels[(across - rng.randint(20, 50)) ** 2 + (down - rng.randint(20, 40)) ** 2 < 15**2] = 2
    left = rng.randint(size[0] // 2, size[0] - 20)
    labels[size[1] // 3 : size[1] - 10, left : left + 25] = 3
    return labels


def colored(labels):
    return Image.fromarray(COLORS[labels])


def write(path: Path, picture: Image.Image | np.ndarray, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(path, **how)
    return path


def write_pair(root, name="a", split="train", seed=0, labels=None, add=0):
    labels = scene(seed) if labels is None else labels
    write(root / "images" / split / f"{name}.png", colored(labels))
    return write(root / "annotations" / split / f"{name}.png", (labels + add).astype(np.uint8))


def evaluation(root, classes=CLASSES, **changed):
    return build_dataset(segmentation_args(root, eval_data_path=str(root), **changed), False, classes)
