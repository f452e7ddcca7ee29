"""Files of visual tokens.

Several processes each write a share of the codes; the shares are then joined in order.
A finished folder holds
- about.json: what was encoded, and how;
- files.txt and skipped.txt: a line for each image, and for each that cannot be read;
- codes.npy (images, N): row i belongs to line i of files.txt; or codes.jsonl: a line
  {"file": ..., "codes": rows of the grid} for each image.

Neither writing nor reading holds all codes in memory. N patches, K codes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torchvision.utils import save_image

import norm_ema_quantizer
from checkpoint_io import checkpoints
from errors import UserError
from runtime.terminal import log
from transforms import ImageOnly
from visualization import drawing, inputs

ABOUT = "about.json"
RESULTS = ("codes.npy", "codes.jsonl")
LISTS = ("files", "skipped")  # .txt
BLOCK = 4096  # images read at a time
SHEET, SHEET_COLUMNS = 16, 8  # token maps on one picture
MOST_CODES = 1 << 24
ABOUT_TYPES: dict[str, Any] = {  # of the entries of about.json that readers need
    "images": int,
    "grid": list,
    "n_codes": int,
    "input_size": int,
    "perplexity": (int, float),
    "view": str,
    "tokenizer_weight": str,
    "data_path": str,
    "crop_pct": (int, float, type(None)),
}


def open_text(path: Path, mode: str) -> IO[str]:
    """Names of files are kept as they are, including those that are not UTF-8."""
    return open(path, mode, encoding="utf-8", errors="surrogateescape", newline="\n")


@dataclass(frozen=True)
class Parts:
    """The shares of `world_size` processes, in order of rank.

    `grid`: rows and columns of patches.
    """

    folder: Path
    world_size: int
    n_codes: int
    grid: tuple[int, int]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.n_codes <= 1 << 16 else np.int32).newbyteorder("<")

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def path(self, kind: str, rank: int = 0) -> Path:
        return self.folder / f".{kind}.{rank}{checkpoints.PART}"

    def lines(self, kind: str) -> Iterator[str]:
        for rank in range(self.world_size):
            with open_text(self.path(kind, rank), "r") as file:
                yield from (line.rstrip("\n") for line in file)

    def blocks(self) -> Iterator[np.ndarray]:
        """The codes of up to BLOCK images at a time, (images, N)."""
        for rank in range(self.world_size):
            with open(self.path("codes", rank), "rb") as file:
                while block := file.read(BLOCK * self.patches * self.dtype.itemsize):
                    yield np.frombuffer(block, self.dtype).reshape(-1, self.patches)

    def images(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, codes (h, w)) of every image."""
        codes = (row.reshape(self.grid) for block in self.blocks() for row in block)
        return zip(self.lines("files"), codes, strict=True)

    def usage(self) -> dict[str, Any]:
        """How many images there are, and how evenly they use the codes."""
        counts, images = np.zeros(self.n_codes, dtype=np.int64), 0
        for block in self.blocks():
            counts += np.bincount(block.ravel(), minlength=self.n_codes)
            images += len(block)
        perplexity = norm_ema_quantizer.perplexity(torch.from_numpy(counts).double())
        return {"images": images, "codes_used": int((counts > 0).sum()), "perplexity": round(perplexity, 2)}

    def remove(self) -> None:
        for kind in ("codes", *LISTS, *RESULTS, *(f"{kind}.txt" for kind in LISTS), ABOUT):
            for path in self.folder.glob(f".{kind}.*{checkpoints.PART}"):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def share_writer(
    parts: Parts, rank: int
) -> Iterator[Callable[[torch.Tensor, Iterable[str], Iterable[str]], None]]:
    """Open the files of one process's share for writing.

    Yields add(codes, names, skipped): codes (images, N), the names of these images, and
    the files that were left out, each with the reason.
    """
    with (
        open(parts.path("codes", rank), "wb") as codes_file,
        open_text(parts.path("files", rank), "w") as names_file,
        open_text(parts.path("skipped", rank), "w") as skipped_file,
    ):

        def add(codes: torch.Tensor, names: Iterable[str], skipped: Iterable[str]) -> None:
            codes_file.write(codes.cpu().numpy().astype(parts.dtype).tobytes())
            names_file.writelines(f"{name}\n" for name in names)
            skipped_file.writelines(" ".join(text.splitlines()) + "\n" for text in skipped)

        yield add


def join_parts(parts: Parts, form: str, about: dict[str, Any]) -> dict[str, Any]:
    """Write the finished folder from all shares; `form`: npy or jsonl.

    Returns `about` with the counts added. The codes of an earlier run are removed first
    and those of this run appear last, so that a folder with codes is complete and of
    one run. UserError if no image could be read; then the files of an earlier run stay.
    """
    counted = parts.usage() | {"skipped": sum(1 for _ in parts.lines("skipped"))}
    if not counted["images"]:
        first = ", ".join(itertools.islice(parts.lines("skipped"), 3))
        raise UserError(f"no image could be read: {first}")
    about = counted | {"format": form, "n_codes": parts.n_codes, "grid": list(parts.grid)} | about
    for kind in LISTS:
        with open_text(parts.path(f"{kind}.txt"), "w") as file:
            file.writelines(f"{line}\n" for line in parts.lines(kind))
    parts.path(ABOUT).write_text(
        json.dumps(checkpoints.to_plain_data(about), indent=1) + "\n", encoding="utf-8"
    )
    (write_npy if form == "npy" else write_jsonl)(parts, counted["images"], parts.path(f"codes.{form}"))
    for old in RESULTS:
        (parts.folder / old).unlink(missing_ok=True)
    for name in ("files.txt", "skipped.txt", ABOUT, f"codes.{form}"):
        with open(parts.path(name), "rb+") as finished:
            os.fsync(finished.fileno())
        os.replace(parts.path(name), parts.folder / name)
    checkpoints.sync_folder(parts.folder)
    return about


def write_npy(parts: Parts, images: int, path: Path) -> None:
    header = {"descr": parts.dtype.str, "fortran_order": False, "shape": (images, parts.patches)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.writelines(block.tobytes() for block in parts.blocks())


def write_jsonl(parts: Parts, images: int, path: Path) -> None:
    with open(path, "w", encoding="ascii") as file:
        for name, codes in parts.images():
            file.write(json.dumps({"file": name, "codes": codes.tolist()}) + "\n")


@dataclass(frozen=True)
class EncodedFolder:
    """A finished folder with codes.npy. `codes`: (images, N), mapped into memory."""

    folder: Path
    about: dict[str, Any]
    codes: np.ndarray

    def names(self, images: Iterable[int]) -> dict[int, str]:
        """The names of these images, by number; the list of all is not kept in
        memory.
        """
        wanted, path = set(images), self.folder / "files.txt"
        try:
            with open_text(path, "r") as file:
                found = {number: line.rstrip("\n") for number, line in enumerate(file) if number in wanted}
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); encode the images again") from None
        if len(found) < len(wanted):
            raise UserError(
                f"{path}: has no line for image {min(wanted - found.keys())}; encode the images again"
            )
        return found


def read_codes(folder: str, flag: str) -> EncodedFolder:
    """Open a finished folder.

    UserError if it holds no codes.npy, or one that does not fit about.json; `flag`
    names the folder in messages.
    """
    path = Path(folder)
    if not (path / "codes.npy").exists():
        other = (
            "codes.jsonl: encode_images.py with --format npy"
            if (path / "codes.jsonl").exists()
            else "nothing finished by it"
        )
        raise UserError(f"{flag} {folder}: codes.npy of encode_images.py is needed, here is {other}")
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        codes = np.load(path / "codes.npy", mmap_mode="r")
        wrong = [name for name, kind in ABOUT_TYPES.items() if not isinstance(about[name], kind)]
        if wrong or not 0 < about["n_codes"] <= MOST_CODES or codes.dtype.kind not in "iu":
            raise ValueError(f"{wrong[0] if wrong else 'n_codes or the kind of the codes'} is wrong")
        fits = codes.shape == (about["images"], about["grid"][0] * about["grid"][1])
        fits = fits and about["input_size"] >= about["grid"][0] > 0 < about["grid"][1]
    except (OSError, EOFError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{flag} {folder}: {ABOUT} or codes.npy cannot be read ({error})") from None
    if not fits:
        raise UserError(
            f"{flag} {folder}: {ABOUT} and codes.npy do not belong together; encode the images again"
        )
    return EncodedFolder(path, about, codes)


def draw_token_maps(parts: Parts, view: ImageOnly, root: str, count: int) -> None:
    """Draw the first `count` images, whose names are relative to the folder `root`,
    above their token maps: SHEET of them in a picture token_maps-N.png beside the
    codes.
    """
    for old in parts.folder.glob("token_maps-*.png"):
        old.unlink()
    readable = (
        (name, codes, picture)
        for name, codes in parts.images()
        if (picture := inputs.read_or_leave_out(os.path.join(root, name), view.pixels)) is not None
    )
    shown = itertools.islice(readable, count)
    for number in itertools.count():
        images, maps = [], []
        for name, codes, picture in itertools.islice(shown, SHEET):
            image = drawing.enlarge(drawing.as_rgb(view(picture)["image"]))
            grid = torch.from_numpy(codes.astype(np.int64))
            images.append(drawing.add_caption(image, name))
            maps.append(drawing.token_map(grid, parts.n_codes, image.shape[1:]))
        if not images:
            return
        rows = [
            drawing.side_by_side(row[start : start + SHEET_COLUMNS])
            for start in range(0, len(images), SHEET_COLUMNS)
            for row in (images, maps)
        ]
        path = parts.folder / f"token_maps-{number}.png"
        save_image(drawing.stack_rows(rows), path)
        log.info(f"maps       {path}")
