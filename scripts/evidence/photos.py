"""The sets of photos: what they are, and small copies of them in train/ and val/."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import demo_segmentation
from data_pipeline.image_formats import load_image
from demo_photos import shrink, solar_cells
from errors import UserError

SHORT_SIDE = 108  # of the copies: the models see 96 pixels
TILE, TILE_ROWS = 144, 7  # a photo is scaled to so many rows of tiles
VALIDATES = 0.7  # the columns from here on, as a share of the width
INSTALLED = Path("/usr/share/backgrounds/mate/nature")
PACKAGE = "mate-backgrounds"
DONE = "digest.txt"
FEW_MASKS = 6  # of so many training tiles, one has its mask


@dataclass(frozen=True)
class Photos:
    name: str
    title: str
    license: str
    vflip: bool  # whether upside down they look the same on average
    make: Callable[[Path], None]  # copies below a folder


def make_cells(folder: Path) -> None:
    for number, (source, label, validates) in enumerate(solar_cells()):
        target = folder / ("val" if validates else "train") / label / f"{number:06d}.jpg"
        if not shrink(source, target, SHORT_SIDE):
            raise UserError(f"{source} cannot be read: install elpv-dataset again")


def make_tiles(folder: Path) -> None:
    if INSTALLED.is_dir():
        cut_photos(INSTALLED, folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        commands = (["apt-get", "download", PACKAGE], ["sh", "-c", f"dpkg-deb -x {PACKAGE}_*.deb ."])
        for command in commands:
            if not shutil.which(command[0]) or subprocess.run(command, cwd=scratch).returncode:
                raise UserError(
                    f"the photos of Debian's package {PACKAGE} are needed and `{' '.join(command)}` failed: "
                    f"install it, so that {INSTALLED} exists, or ask for `photos` cells alone"
                )
        cut_photos(Path(scratch, *INSTALLED.parts[1:]), folder)


def cut_photos(source: Path, folder: Path) -> None:
    """Each photo is a class; its tiles on the right validate."""
    for path in sorted(source.glob("*.jpg")):
        photo = load_image(str(path))
        height = TILE * TILE_ROWS
        photo = photo.resize((round(photo.width * height / photo.height), height), Image.Resampling.BICUBIC)
        columns = photo.width // TILE
        for column in range(columns):
            split = "val" if column >= round(VALIDATES * columns) else "train"
            for row in range(TILE_ROWS):
                x, y = column * TILE, row * TILE
                tile = photo.crop((x, y, x + TILE, y + TILE))
                target = folder / split / path.stem / f"{row}-{column:02d}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                tile.resize((SHORT_SIDE, SHORT_SIDE), Image.Resampling.BICUBIC).save(target, quality=95)


def make_assay(folder: Path) -> None:
    """As scripts/demo_segmentation.py makes it; and few/, with the masks of a sixth of the
    training tiles.
    """
    demo_segmentation.OUT = folder
    folder.mkdir(parents=True)
    demo_segmentation.prepare(demo_segmentation.fetch())
    shutil.rmtree(folder / "download")
    for kind in ("images", "annotations"):
        shutil.copytree(folder / "data" / kind / "val", folder / "few" / kind / "val")
        (folder / "few" / kind / "train").mkdir(parents=True)
        for path in sorted((folder / "data" / kind / "train").iterdir())[::FEW_MASKS]:
            shutil.copy(path, folder / "few" / kind / "train")


SETS = (
    Photos("cells", "2,624 photos of solar cells (PyPI elpv-dataset)", "CC BY-NC-SA 4.0", True, make_cells),
    Photos("tiles", "tiles of 12 photos of nature (Debian mate-backgrounds)", "GPL-2+", False, make_tiles),
    Photos("assay", "tiles of one field of cells (PyPI ndev-sampledata)", "BSD-3-Clause", True, make_assay),
)
ALL = {photos.name: photos for photos in SETS}
CLASSIFIED = ("cells", "tiles")


def prepare(name: str, folder: Path) -> str:
    """The copies in folder/name, made once; a digest of all of them."""
    done = folder / name / DONE
    if not done.exists():
        scratch = folder / f"{name}-unfinished"
        shutil.rmtree(scratch, ignore_errors=True)
        ALL[name].make(scratch)
        (scratch / DONE).write_text(digest(scratch) + "\n")
        scratch.rename(folder / name)
    return done.read_text().strip()


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(path for end in ("jpg", "png") for path in folder.rglob(f"*.{end}")):
        found.update(f"{path.relative_to(folder)} ".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def count_classes(folder: Path) -> dict[str, int]:
    """Class -> photos, of a split."""
    return {path.name: len(list(path.glob("*.jpg"))) for path in sorted(folder.iterdir()) if path.is_dir()}
