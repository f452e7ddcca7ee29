"""The photos of the demo: those of solar cells that come with a package, or the user's
own.
"""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from pathlib import Path

from PIL import Image

from advice.command import Command, Machine
from advice.inspection import VALIDATES, inspect_folder, list_folder
from advice.plan import make_plan
from data_pipeline.image_formats import load_image
from data_pipeline.resizing import cut_to_length
from data_pipeline.samplers import evenly_spaced
from errors import printable

Photo = tuple[Path, str, bool]  # file, class, whether it validates

# photos are shrunk once: the model sees 128 pixels, and decoding would take longer than
# training
SHORT_SIDE = 144
MOST_IMAGES = 4000
# neighboring rows of the photos' list may share a solar module: split in blocks, every
# fifth to validate
BLOCKS = 20


def shrink(source: str | Path, target: Path, short_side: int = SHORT_SIDE) -> bool:
    """A copy whose shorter side has so many pixels; False for files that are no image."""
    try:
        image = cut_to_length(load_image(str(source)))
    except Exception as error:
        print(printable(f"cannot read {source} ({error}): left out"))
        return False
    scale = short_side / min(image.size)
    target.parent.mkdir(parents=True, exist_ok=True)
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC).save(
        target, quality=95
    )
    return True


def link(source: Path, target: Path) -> bool:
    """For images that 8-bit RGB cannot hold."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())
    return True


def solar_cells() -> list[Photo]:
    """Those of the PyPI package elpv-dataset: mono/poly x ok/defect."""
    import elpv_dataset

    folder = Path(elpv_dataset.__file__).parent / "data"
    print(
        "photos     2,624 photos of solar cells, from the package elpv-dataset (Buerhop-Lutz et al. 2018;\n"
        "           Deitsch et al. 2019); license: CC BY-NC-SA 4.0 (non-commercial use, share alike)"
    )
    with open(folder / "labels.csv", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, delimiter=" ", skipinitialspace=True) if len(row) >= 3]
    photos = []
    for number, (path, probability, kind, *_) in enumerate(rows):
        label = f"{kind}_{'defect' if float(probability) >= 0.5 else 'ok'}"
        photos.append((folder / path, label, number * BLOCKS // len(rows) % 5 == 4))
    return photos


def plan_solar_cells(output: Path) -> list[Command]:
    """What advise.py advises for those in output/data on a CPU."""
    # a solar cell can be mounted either way
    folder = dataclasses.replace(inspect_folder(str(output / "data")), has_up=False)
    return make_plan(folder, Machine.here("cpu"), str(output))


def own_images(root: str) -> list[Photo]:
    """The user's folder: up to MOST_IMAGES, evenly spread. The photos of val/ validate
    where there are train/ and val/, else every fifth of a class.
    """
    found = list_folder(root)
    if len(found) > MOST_IMAGES:
        print(
            f"photos     {len(found)} images in the folder; the demo takes {MOST_IMAGES} of them, evenly "
            "spread"
        )
        found = [found[index] for index in evenly_spaced(len(found), MOST_IMAGES)]
    has_splits = any(each.validates for each in found)
    photos, seen = [], Counter[str]()
    for each in found:
        label = each.label or "images"
        validates = each.validates if has_splits else seen[label] % VALIDATES == VALIDATES - 1
        photos.append((each.path, label, validates))
        seen[label] += 1
    if has_splits:
        print("photos     train/ and val/ are the splits")
    kinds = f"{len(seen)} classes" if len(seen) > 1 else "unlabeled"
    print(printable(f"photos     {root}: {len(found)} images, {kinds}"))
    return photos
