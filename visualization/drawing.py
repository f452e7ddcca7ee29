"""Pictures of masks, tokens and attention. Images are float tensors (3, height, width)
in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from errors import printable

MASK_GRAY = 0.45
GAP = 2  # white pixels between neighboring pictures
CAPTION = 16  # height of a line of text in pixels
# In TensorBoard, whose cards are 350 pixels wide and shrink the picture.
LARGE_CAPTION = 20
# Names of files have letters that Pillow's own font lacks.
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
RED = (0.9, 0.1, 0.1)


def denormalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the input normalization: (..., C, height, width) -> the same in [0, 1]."""
    shape = (-1, 1, 1)
    return (image * torch.tensor(std).view(shape).to(image) + torch.tensor(mean).view(shape).to(image)).clamp(
        0, 1
    )


def as_rgb(image: Tensor) -> Tensor:
    """What pictures show of an image (C, height, width): its first three channels, or
    the first one in gray where there are fewer.
    """
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def masked_image(image: Tensor, mask: Tensor) -> Tensor:
    """Gray where `mask` (h, w) is True; every mask cell covers a rectangle of the
    image.
    """
    cover = stretch(mask.float()[None], image.shape[-2:])
    return image * (1 - cover) + MASK_GRAY * cover


def stretch(cells: Tensor, size: Sequence[int]) -> Tensor:
    """(C, h, w) -> (C, *size), each cell a flat rectangle."""
    return F.interpolate(cells[None], size=tuple(size), mode="nearest")[0]


def code_colors(n_codes: int) -> Tensor:
    """A fixed color for every code: (K, 3).

    The hue advances by the golden ratio, so that neighboring numbers differ.
    """
    hue = torch.arange(n_codes) * 0.61803399 % 1.0
    value = 0.55 + 0.45 * (torch.arange(n_codes) * 0.75487767 % 1.0)
    channels = (hue[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6
    return value[:, None] * (1 - 0.8 * (1 - ((channels - 3).abs() - 1).clamp(0, 1)))


def distinct_colors(n: int) -> Tensor:
    """Fixed colors (n, 3) that are easily told apart, dark gray first.

    Each color is the one farthest from all before it by distance in CIELAB (D65). The
    candidates have 8 levels per channel and are neither nearly black nor nearly white.
    """
    levels = torch.linspace(0, 1, 8, dtype=torch.float64)
    colors = torch.cat(
        (torch.tensor([[0.16, 0.16, 0.2]], dtype=torch.float64), torch.cartesian_prod(levels, levels, levels))
    )
    linear = torch.where(colors > 0.04045, ((colors + 0.055) / 1.055) ** 2.4, colors / 12.92)
    to_xyz = torch.tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], dtype=torch.float64
    )
    white = to_xyz.sum(dim=1)
    x, y, z = ((linear @ to_xyz.T / white).clamp(min=1e-9) ** (1 / 3)).unbind(dim=1)
    lab = torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)
    near = (lab - lab[0]).norm(dim=1)  # distance to the nearest of those that are taken
    near[(lab[:, 0] < 30) | (lab[:, 0] > 92)] = 0
    taken = [0]
    while len(taken) < n:
        taken.append(int(near.argmax()))
        near = torch.minimum(near, (lab - lab[taken[-1]]).norm(dim=1))
    return colors[taken[:n]].float()


def token_map(codes: Tensor, n_codes: int, size: Sequence[int]) -> Tensor:
    """Codes (h, w) int64 -> picture of `size`, one color per code; gray for negative
    codes.
    """
    colors = code_colors(n_codes)[codes.clamp(min=0)]
    colors[codes < 0] = MASK_GRAY
    return stretch(colors.permute(2, 0, 1), size)


def draw_reconstructions(
    images: Sequence[Tensor],
    codes: Tensor,
    n_codes: int,
    drawn: Sequence[Tensor],
    captions: Sequence[Sequence[str]] | None = None,
    a_row: int = 8,
) -> Tensor:
    """Images, token maps of their codes (B, h, w), and what a decoder drew from the
    codes.

    `captions`: three texts for each image, one for each of the three; the pictures are
    enlarged to make room for them. `a_row`: images in a row.
    """
    images, drawn = [as_rgb(image) for image in images], [as_rgb(image) for image in drawn]
    if captions is not None:
        images, drawn = [enlarge(image) for image in images], [enlarge(image) for image in drawn]
    kinds = [images, [token_map(c.cpu(), n_codes, images[0].shape[-2:]) for c in codes], drawn]
    if captions is not None:
        texts = zip(*captions, strict=True)
        kinds = [list(map(add_caption, kind, text)) for kind, text in zip(kinds, texts, strict=True)]
    rows = [
        side_by_side(kind[start : start + a_row]) for start in range(0, len(images), a_row) for kind in kinds
    ]
    return stack_rows(rows)


def side_by_side(pictures: Sequence[Tensor]) -> Tensor:
    """A row of pictures; lower ones are padded with white at the bottom."""
    return join_along(pictures, dim=2)


def stack_rows(rows: Sequence[Tensor]) -> Tensor:
    """Rows under each other; narrower ones are padded with white on the right."""
    return join_along(rows, dim=1)


def gallery(pictures: Sequence[Tensor], columns: int) -> Tensor:
    """Pictures in reading order, at most `columns` in a row."""
    return stack_rows(
        [side_by_side(pictures[start : start + columns]) for start in range(0, len(pictures), columns)]
    )


def join_along(pictures: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate (3, height, width) along dimension 1 or 2, padded to the largest,
    with gaps.
    """
    other = 3 - dim
    longest = max(picture.shape[other] for picture in pictures)
    pieces: list[Tensor] = []
    for picture in pictures:
        missing = longest - picture.shape[other]
        margin = (0, 0, 0, missing) if dim == 2 else (0, missing, 0, 0)
        filled = F.pad(picture.cpu().float(), margin, value=1.0)
        shape = list(filled.shape)
        shape[dim] = GAP
        pieces += [torch.ones(shape), filled]
    return torch.cat(pieces[1:], dim=dim)


def enlarge(image: Tensor, shorter: int = 160) -> Tensor:
    """Enlarge a small picture, bicubic, by a whole number.

    The number is the one that brings the shorter side closest to `shorter` pixels.
    """
    factor = max(1, round(shorter / min(image.shape[1:])))
    if factor == 1:
        return image
    return F.interpolate(image[None], scale_factor=factor, mode="bicubic", align_corners=False)[0].clamp(0, 1)


def add_caption(picture: Tensor, text: str, height: int = CAPTION) -> Tensor:
    """The picture under a line of text, `height` pixels high; a text that is too long
    is cut in the middle.
    """
    font, width = ImageFont.truetype(FONT, round(height * 11 / 16)), picture.shape[2]
    text = printable(text)
    shown, kept = text, len(text)
    while font.getlength(shown) > width - 2 and kept > 2:
        kept -= 1
        shown = text[: kept // 2] + "..." + text[len(text) - (kept - kept // 2) :]
    strip = Image.new("L", (width, height), 255)
    ImageDraw.Draw(strip).text((1, 0), shown, fill=0, font=font)
    line = torch.from_numpy(np.array(strip)).float() / 255
    return torch.cat((line.expand(3, -1, -1), picture.cpu().float()), dim=1)


def draw_frame(
    picture: Tensor, top: int, left: int, height: int, width: int, line: int = 2, color: Sequence[float] = RED
) -> Tensor:
    """A copy with a frame of `line` pixels around the rectangle.

    The frame lies outside the rectangle, or over its edge at the border of the picture.
    """
    bottom, right = min(top + height + line, picture.shape[1]), min(left + width + line, picture.shape[2])
    top, left = max(top - line, 0), max(left - line, 0)
    frame = torch.zeros(picture.shape[1:], dtype=torch.bool)
    frame[top:bottom, left:right] = True
    frame[top + line : bottom - line, left + line : right - line] = False
    return torch.where(frame, torch.tensor(color).view(3, 1, 1), picture.cpu().float())


def heat_overlay(image: Tensor, heat: Tensor) -> Tensor:
    """Attention (h, w) over the image: dark blue where it is low, yellow where it is
    high.
    """
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    smooth = F.interpolate(
        heat[None, None].float(), size=image.shape[-2:], mode="bilinear", align_corners=False
    )[0]
    low, high = torch.tensor([0.05, 0.05, 0.35]).view(3, 1, 1), torch.tensor([1.0, 0.9, 0.1]).view(3, 1, 1)
    color = low + (high - low) * smooth
    return 0.45 * image.cpu().float() + 0.55 * color


def keep_most(weights: Tensor, share: float) -> Tensor:
    """The fewest cells that hold at least `share` of the sum: (h, w) bool, True for
    kept.

    `weights`: (h, w), not negative.
    """
    ordered, cells = weights.flatten().double().sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered  # what the larger cells hold
    kept = torch.zeros_like(cells, dtype=torch.bool)
    kept[cells] = before < share * ordered.sum()
    return kept.view(weights.shape)


def spotlight(image: Tensor, kept: Tensor) -> Tensor:
    """The image as it is where `kept` (h, w) is True, dark blue elsewhere."""
    cover = stretch(kept.float()[None], image.shape[-2:])
    image = image.cpu().float()
    dark = 0.4 * image + 0.6 * torch.tensor([0.05, 0.05, 0.35]).view(3, 1, 1)
    return image * cover + dark * (1 - cover)


def label_overlay(image: Tensor, labels: Tensor, colors: Tensor, opacity: float = 0.5) -> Tensor:
    """Each pixel's class (h, w) as one of K colors (K, 3) over the image.

    Pixels whose label has no color show the image alone.
    """
    known = (labels >= 0) & (labels < len(colors))
    cover = colors.to(image)[labels.clamp(0, len(colors) - 1)].permute(2, 0, 1)
    return torch.where(known, (1 - opacity) * image + opacity * cover, image)


def segmentation_row(image: Tensor, labelings: Sequence[Tensor], colors: Tensor) -> Tensor:
    """The image (3, h, w), and beside it each labeling (of any size) over it."""
    overlays = [
        label_overlay(image, stretch(labels[None].float(), image.shape[1:])[0].long(), colors)
        for labels in labelings
    ]
    return side_by_side([image, *overlays])


def usage_histogram(counts: Tensor, height: int = 120, width: int = 512) -> Tensor:
    """How often each code is used (K,), most used first, on a logarithmic scale."""
    ordered = counts.float().cpu().sort(descending=True).values
    level = torch.log1p(ordered) / torch.log1p(ordered.max()).clamp(min=1e-12)
    level = F.interpolate(level[None, None], size=width, mode="linear", align_corners=False)[0, 0]
    bars = torch.arange(height, 0, -1)[:, None] <= level[None] * height
    picture = torch.ones(3, height, width)
    picture[:, bars] = torch.tensor([0.2, 0.4, 0.7]).view(3, 1)
    return picture


def plot_curves(panels: dict[str, dict[str, Sequence[float]]], path: Path) -> None:
    """Write a PNG with one panel per title: {title: {label: values per epoch}}.

    nan stands for epochs without a value.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, values in lines.items():
            known = np.flatnonzero(np.isfinite(values))  # not every epoch is evaluated
            axis.plot(known + 1, np.asarray(values)[known], ".-", markersize=3, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
