"""Pack a folder of images into tar shards of WebDataset's layout, for --data_set
webdataset (docs/data.md).

    python scripts/make_shards.py FOLDER OUT --images_per_shard 8720 [--classes]

Images are copied as they are, in an order shuffled by --seed, so that each shard is a
sample of the whole: training mixes a few shards at a time. NumPy arrays (.npy) are
packed too, and read, as in a folder, beside --in_chans or --image_range alone. OUT
receives 000000.tar, 000001.tar, ..., the index of each, and with --classes classes.txt.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import webdataset  # noqa: E402
from tqdm import tqdm  # noqa: E402

import arguments  # noqa: E402
from data_pipeline import shard_index, shards  # noqa: E402
from data_pipeline.array_files import ARRAY_EXTENSIONS  # noqa: E402
from data_pipeline.image_formats import open_regular  # noqa: E402
from data_pipeline.image_lists import EXTENSIONS, Samples, find_classes_folder, find_images  # noqa: E402
from errors import ArgumentParser, UserError, printable, report_user_errors  # noqa: E402
from runtime.seeding import derive_seed  # noqa: E402


def get_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder",
        type=arguments.expand_home,
        help="images, however nested; with --classes one folder per class",
    )
    parser.add_argument("out", type=arguments.expand_home, help="where the shards go; without shards yet")
    parser.add_argument(
        "--images_per_shard",
        type=arguments.positive,
        required=True,
        help="100 MB to 1 GB per shard is a good size",
    )
    parser.add_argument(
        "--classes", action="store_true", help="also write labels: the classes' numbers, and classes.txt"
    )
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, help="the order of the images derives from it (default: 0)"
    )
    return parser


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    out = Path(args.out)
    samples: Samples
    samples, classes = (find_classes_folder if args.classes else find_images)(
        args.folder, "FOLDER", endings=ARRAY_EXTENSIONS
    )
    arrays = sum(not str(source).lower().endswith(EXTENSIONS) for source, _ in samples)
    make_empty(out)
    order = list(range(len(samples)))
    random.Random(derive_seed(args.seed, "shards")).shuffle(order)
    count = math.ceil(len(order) / args.images_per_shard)
    digits = max(6, len(str(count - 1)))
    if classes is not None:
        write_class_names(out / shards.CLASS_NAMES, classes)
    for number in tqdm(range(count), desc="shards", disable=None):
        first = number * args.images_per_shard
        chosen = range(first, min(first + args.images_per_shard, len(order)))
        write_shard(
            out / f"{number:0{digits}d}.tar",
            ((order[index], *samples[order[index]]) for index in chosen),
            ARRAY_EXTENSIONS if arrays else EXTENSIONS,
        )
    pattern = out / f"{{{0:0{digits}d}..{count - 1:0{digits}d}}}.tar"
    of_them = f" ({arrays:,} of them arrays: add --in_chans or --image_range)" if arrays else ""
    use = f"--data_set webdataset --data_path '{pattern}'"
    print(printable(f"{len(samples):,} images{of_them} in {count} shards: {use}"))


def make_empty(out: Path) -> None:
    """Make the folder; refuse one that has shards, which might be read together with
    the new ones.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUT {out}: cannot be made ({error.strerror})") from None
    if any(out.glob("*.tar")):
        raise UserError(f"OUT {out}: has shards already; remove them, or name another folder")


def write_class_names(path: Path, classes: Sequence[str]) -> None:
    for name in classes:
        if name.splitlines() != [name] or not name.strip() or name != name.encode(errors="ignore").decode():
            raise UserError(
                f"FOLDER: the class name {name!a} is not a line of text, which {path.name} "
                "is to hold: rename it"
            )
    path.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def read_image_bytes(source: str) -> bytes:
    try:
        with open_regular(source) as file:
            return file.read()
    except OSError as error:
        raise UserError(
            f"FOLDER: {source} cannot be read ({error.strerror or error}); repair or remove it"
        ) from None


def write_shard(path: Path, samples: Any, endings: Sequence[str]) -> None:
    """`samples`: (number in the folder, path, label or None); `endings`: of what its
    index lists. The shard appears when it is whole.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            for number, source, label in samples:
                stem, kind = os.path.splitext(os.path.basename(source))
                # dots would end it; tar names are short
                key = f"{number:08d}_{re.sub(r'[^A-Za-z0-9_-]', '-', stem)[:60]}"
                content: dict[str, Any] = {"__key__": key, kind[1:].lower(): read_image_bytes(source)}
                writer.write(content if label is None else content | {"cls": str(label).encode()})
        os.replace(temporary, path)
        shard_index.keep_index(str(path), endings, shard_index.scan(str(path), endings))
    except OSError as error:
        raise UserError(
            f"could not write {path} ({error.strerror}: {error.filename or 'the disk'}); start again"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
