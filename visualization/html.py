"""HTML pages of one file: pictures are embedded, and nothing is loaded from
elsewhere.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from errors import printable

if TYPE_CHECKING:
    from torch import Tensor

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2rem 0 0; }
p { margin: .3rem 0; max-width: 48rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th { text-align: left; font-weight: normal; opacity: .75; vertical-align: top; }
th { padding: .1rem 1.5rem .1rem 0; }
td { overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
.pictures { display: flex; flex-wrap: wrap; gap: 6px; margin: .5rem 0; }
.swatch { display: inline-block; width: 1em; height: 1em; vertical-align: -.12em; }
.swatch { margin-right: .3em; border: 1px solid #8888; }
"""


def escape(text: str) -> str:
    return html.escape(printable(text))


def picture(image: Tensor, alt: str, form: str = "JPEG") -> str:
    """An <img> of (3, height, width) in [0, 1]; `alt` describes it in words.

    `form`: JPEG, or PNG for drawings.
    """
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    settings = {"quality": 88, "subsampling": 0} if form == "JPEG" else {"optimize": True}
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, form, **settings)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    text = escape(alt)
    height, width = image.shape[1:]
    return (
        f'<img src="data:image/{form.lower()};base64,{data}" width="{width}" height="{height}" '
        f'alt="{text}" title="{text}">'
    )


def pictures(images: Iterable[str]) -> str:
    """<img>s beside each other."""
    return '<div class="pictures">\n' + "\n".join(images) + "\n</div>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns: names and values."""
    cells = (f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return "<table>\n" + "\n".join(cells) + "\n</table>"


def section(title: str, *parts: str, anchor: str, color: Iterable[float] | None = None) -> str:
    """A heading and the parts under it.

    `anchor`: the name of the section in links; `color`: RGB in [0, 1], shown as a
    swatch before the title.
    """
    swatch = ""
    if color is not None:
        code = "".join(f"{round(255 * channel):02x}" for channel in color)
        swatch = f'<span class="swatch" style="background:#{code}"></span>'
    heading = f"<h2>{swatch}{escape(title)}</h2>"
    return "\n".join([f'<section id="{escape(anchor)}">', heading, *parts, "</section>"])


def document(title: str, *parts: str, style: str = "") -> str:
    """The whole page; the parts are HTML. `style`: more CSS."""
    name = escape(title)
    head = (
        f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n<title>{name}</title>'
    )
    body = "\n".join([f"<h1>{name}</h1>", *parts])
    inside = f"<head>\n{head}\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>"
    return f'<!DOCTYPE html>\n<html lang="en">\n{inside}\n</html>\n'
