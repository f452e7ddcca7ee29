"""What is opened as an image, and what never is."""

import ast
import io
import os

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from source_files import all_files

from data_pipeline.image_formats import DECODED, EXTENSIONS, FORMATS, load_image, open_image
from segmentation.mask_files import read_mask

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_is_started_by_an_image(tmp_path, monkeypatch):
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for anew
    evil = tmp_path / "evil.jpg"
    evil.write_bytes(EPS)
    for read in (load_image, read_mask):
        with pytest.raises(
            UnidentifiedImageError,
            match=(r"^PostScript, which is not decoded; convert it to JPEG or " r"PNG$"),
        ):
            read(str(evil))
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"%PDF-1.7\n", "PDF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"8BPS\0\1" + bytes(30), "Photoshop"),
        (b"", "not an image"),
        (b"\x89PNG nonsense", "not an image"),
    ],
)
def test_content_decides_whatever_the_name(content, what, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UnidentifiedImageError, match=what):
        load_image(str(tmp_path / "x.png"))


def test_every_format_of_the_table_is_decoded(tmp_path):
    pixels = np.full((40, 40, 3), (200, 90, 30), dtype=np.uint8)
    for name in DECODED:
        for target in (tmp_path / f"x{FORMATS[name][0]}", io.BytesIO()):
            Image.fromarray(pixels).save(target, name)
            if isinstance(target, io.BytesIO):
                target.seek(0)
            image = load_image(target if isinstance(target, io.BytesIO) else str(target))
            assert np.abs(np.asarray(image).astype(int) - pixels).max() < 12, name
    assert {".jfif", ".jpe", ".gif", ".jp2", ".jpg", ".webp"} < set(EXTENSIONS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_among_the_images_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(OSError, match="no regular file"):
        load_image(str(tmp_path / "x.jpg"))
    with pytest.raises(OSError, match=r"^a folder$"), open_image(tmp_path):
        pass


def calls_of_image_open(text: str) -> int:
    """Calls of PIL's open, under whatever name the module was imported."""
    tree, names = ast.parse(text), {"Image", "PIL.Image"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("PIL", "PIL.Image"):
            names |= {alias.asname or alias.name for alias in node.names if alias.name == "Image"}
            if any(alias.name == "open" for alias in node.names):
                return 1
        if isinstance(node, ast.Import):
            names |= {alias.asname for alias in node.names if alias.name == "PIL.Image" and alias.asname}
    return sum(
        isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node.value) in names
        for node in ast.walk(tree)
    )


def test_images_are_opened_in_one_place():
    assert calls_of_image_open("import PIL.Image as P\nP.open(x)") == 1
    found = {path.name: count for path in all_files() if (count := calls_of_image_open(path.read_text()))}
    assert found == {"image_formats.py": 1}
