"""Images that cannot be decoded, are no images, or ask for programs."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fuzzing.runs import Case, valid_runs


def image_case(draw: random.Random, shared: Path, folder: Path) -> Case:
    """One bad file among the photos, or among the images or masks of segmentation."""
    entry = draw.choice(
        (
            "run_vqkd_training",
            "run_beitv2_pretraining",
            "run_class_finetuning",
            "run_class_finetuning",
            "run_linear_eval",
            "encode_images",
            "run_segmentation_finetuning",
            "visualize_attention",
        )
    )
    data = folder / "data"
    data.mkdir()
    shutil.copytree(shared / "photos", data / "photos")
    shutil.copytree(shared / "pairs", data / "pairs")
    for name in ("tokenizer.pth", "student.pth"):
        os.link(shared / name, data / name)
    if entry == "run_segmentation_finetuning":
        part = draw.choice(("images/training/1.jpg", "annotations/training/1.png", "images/validation/1.jpg"))
        path = data / "pairs" / part
    else:
        path = data / "photos" / "a" / draw.choice(("1.jpg", "3.jpg"))
    what, unreadable = draw.choice(BAD_IMAGES)(draw, path)
    if draw.random() < 0.2 and path.exists():
        path = path.rename(
            path.with_name(
                draw.choice(("\x1b[31m", "a\nb", "\u202egnp", "x\udcff", "ü", "a'b\"c", "-x", "%s{0}"))
                + path.suffix
            )
        )
        what += f", called {path.name!a}"
        if entry == "run_segmentation_finetuning":  # its partner has another name now
            unreadable = False
        return Case("images", f"{entry}: {what}", entry, valid_runs(data, folder / "out")[entry])
    named = (path.name, str(path))
    # those read a part of the images alone
    read = entry != "visualize_attention" and "training" not in path.parts
    must_name = unreadable and read
    return Case(
        "images",
        f"{entry}: {what}",
        entry,
        valid_runs(data, folder / "out")[entry],
        must_name=must_name,
        named=named,
    )


BadImage = Callable[[random.Random, Path], tuple[str, bool]]  # -> in words, whether it cannot be decoded


def cut_image(draw: random.Random, path: Path) -> tuple[str, bool]:
    share = draw.choice((0.0, 0.05, 0.3, 0.6))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return f"cut to {share}", True


def flip_image(draw: random.Random, path: Path) -> tuple[str, bool]:
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 30)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return "flipped bits", False


def calling_image(draw: random.Random, path: Path) -> tuple[str, bool]:
    """Formats for which an image library calls a program, or that hold programs."""
    contents = {
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n",
        "EPS with a binary head": b"\xc5\xd0\xd3\xc6\x1e\0\0\0\x40\0\0\0"
        + b"\0" * 18
        + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
        "SVG": (
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image '
            b'href="file:///etc/passwd"/></svg>'
        ),
        "WMF": b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
        "a shell script": b"#!/bin/sh\ntouch canary\n",
        "MVG": b"push graphic-context\nfill 'url(https://h/\"|touch canary\")'\n",
    }
    kind = draw.choice(list(contents))
    path.write_bytes(contents[kind])
    return kind, True


def odd_file(draw: random.Random, path: Path) -> tuple[str, bool]:
    path.unlink()
    kind = draw.choice(("fifo", "link to nothing", "link to itself", "folder", "noise", "/dev/zero"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind.startswith("link"):
        path.symlink_to(path if kind.endswith("itself") else "nothing")
    elif kind == "folder":
        path.mkdir()
    elif kind == "/dev/zero":
        path.symlink_to(kind)
    else:
        path.write_bytes(draw.randbytes(3000))
    return kind, kind == "noise"  # what is not a regular file may be left out of the list, with a count


def odd_pixels(draw: random.Random, path: Path) -> tuple[str, bool]:
    ramp = np.linspace(0, 1, 40 * 56).reshape(40, 56)
    noise = np.random.RandomState(draw.randrange(1000)).rand(40, 56)
    kind = draw.choice(
        ("float", "int32", "uint16", "line", "column", "pixel", "CMYK", "LA", "P", "1", "LAB", "bomb")
    )
    image = {
        "float": lambda: Image.fromarray((ramp * 1.001).astype("float32")),
        "int32": lambda: Image.fromarray((ramp * 100_000).astype("int32")),
        "uint16": lambda: Image.fromarray((ramp * 4095).astype("uint16")),
        "line": lambda: Image.new("L", (65_000, 1)),
        "column": lambda: Image.new("L", (1, 65_000)),
        "pixel": lambda: Image.new("RGB", (1, 1)),
        "bomb": lambda: Image.new("L", (20_000, 20_000)),
    }.get(
        kind,
        lambda: Image.fromarray((noise * 255).astype("uint8")).convert(
            "RGB" if kind in ("CMYK", "LAB") else kind if kind != "P" else "P"
        ),
    )()
    if kind in ("CMYK",):
        image = image.convert("CMYK")
    image.save(path, "PNG" if image.mode in ("L", "LA", "P", "1", "RGB") else "TIFF")
    return f"{kind} pixels", kind in ("float", "int32", "bomb")


BAD_IMAGES: tuple[BadImage, ...] = (
    cut_image,
    cut_image,
    flip_image,
    calling_image,
    calling_image,
    odd_file,
    odd_pixels,
    odd_pixels,
)
