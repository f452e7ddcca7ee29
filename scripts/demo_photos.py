"""The photos of the demo: those of solar cells that come with a package, or the user's
own.
"""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image

from data_pipeline.image_formats import load_image
from data_pipeline.image_lists import find_images
from data_pipeline.resizing import cut_to_length
from errors import printable

# photos are shrunk once: the model sees 128 pixels, and decoding would take longer than
# training
SHORT_SIDE = 144
MOST_IMAGES = 4000
# neighboring rows of the photos' list may share a solar module: split in blocks, every
# fifth to validate
BLOCKS = 20


def shrink(source: str | Path, target: Path) -> bool:
    """A copy whose shorter side is SHORT_SIDE; False for files that are no image."""
    try:
        image = cut_to_length(load_image(str(source)))
    except Exception as error:
        print(printable(f"cannot read {source} ({error}): left out"))
        return False
    scale = SHORT_SIDE / min(image.size)
    target.parent.mkdir(parents=True, exist_ok=True)
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC).save(
        target, quality=95
    )
    return True


def solar_cells() -> list[tuple[Path, str, bool]]:
    """(photo, class, for validation?) of the PyPI package elpv-dataset: mono/poly x
    ok/defect.
    """
    import elpv_dataset

    folder = Path(elpv_dataset.__file__).parent / "data"
    print(
        "photos     elpv-dataset (Buerhop-Lutz et al. 2018; Deitsch et al. 2019), 2,624 photos of solar "
        "cells."
    )
    print("           license of the images: CC BY-NC-SA 4.0 (non-commercial use, share alike)")
    with open(folder / "labels.csv", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, delimiter=" ", skipinitialspace=True) if len(row) >= 3]
    photos = []
    for number, (path, probability, kind, *_) in enumerate(rows):
        label = f"{kind}_{'defect' if float(probability) >= 0.5 else 'ok'}"
        photos.append((folder / path, label, number * BLOCKS // len(rows) % 5 == 4))
    return photos


def own_images(root: str) -> list[tuple[Path, str, bool]]:
    """The user's folder; sub-folders of images are classes when there are two or more.
    The photos of val/ validate where there are train/ and val/, else every fifth.
    """
    splits = [Path(root, split) for split in ("train", "val")]
    roots = splits if all(split.is_dir() for split in splits) else [Path(root)]
    inside = {Path(str(path)): each for each in roots for path, _ in find_images(str(each), "folder")[0]}
    paths = list(inside)
    folders = {path: path.relative_to(each).parts[:-1] for path, each in inside.items()}
    classes = {parents[0] for parents in folders.values() if parents}
    labeled = len(classes) >= 2 and all(folders.values())
    if len(paths) > MOST_IMAGES:
        print(
            f"photos     {len(paths)} images in the folder; the demo takes {MOST_IMAGES} of them, evenly "
            "spread"
        )
        paths = [paths[number * len(paths) // MOST_IMAGES] for number in range(MOST_IMAGES)]
    photos, seen = [], dict.fromkeys([*classes, "images"], 0)
    for path in paths:
        label = folders[path][0] if labeled else "images"
        photos.append((path, label, inside[path] == splits[1] if len(roots) > 1 else seen[label] % 5 == 4))
        seen[label] += 1
    if len(roots) > 1:
        print("photos     train/ and val/ are the splits")
    kinds = f"{len(classes)} classes" if labeled else "unlabeled"
    print(printable(f"photos     {root}: {len(paths)} images, {kinds}"))
    return photos
