"""What class each pixel of an image of any size is: windows that slide over it, several
scales, mirror images.

Shapes: image (3, h, w) as the network takes it, K classes, scores (K, h, w) logits or
probabilities. However large the file, at most the scores of the image at the network's
scale, and of a strip of the file's own size, are held.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.conv_module import resize
from runtime.device import Precision

STRIP = 1 << 22  # scores of one strip of the finished picture: 16 MiB


@dataclass(frozen=True)
class SlidingWindow:
    """How an image is looked at. `window` None: as a whole. `batch`: windows that the
    network sees at once.
    """

    window: int | None = 512
    stride: int = 341
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    batch: int = 2


@torch.no_grad()
def predict(
    model: nn.Module, image: Tensor, size: tuple[int, int], how: SlidingWindow, precision: Precision
) -> Tensor:
    """Classes (height, width) int64 of an image (3, h, w); `size` is the picture's own,
    (height, width).
    """

    def scores_of(batch: Tensor) -> Tensor:
        with precision.autocast():
            return model(batch).float()

    return classes_at(scores(scores_of, image, how), size)


def scores(network: Callable[[Tensor], Tensor], image: Tensor, how: SlidingWindow) -> Tensor:
    """Logits of the image, (K, h, w); of several views the mean of their probabilities,
    each view at the image's size.
    """
    views = list(itertools.product(how.scales, (False, True) if how.flip else (False,)))
    total: Tensor | None = None
    for scale, flipped in views:
        sides = [max(1, round(scale * side)) for side in image.shape[1:]]
        view = resize(image[None], sides)
        logits = slide(network, view.flip(3) if flipped else view, how)
        logits = resize(logits.flip(3) if flipped else logits, image.shape[1:])[0]
        if len(views) == 1:
            return logits
        total = logits.softmax(dim=0) if total is None else total + logits.softmax(dim=0)
    assert total is not None
    return total / len(views)


def slide(network: Callable[[Tensor], Tensor], image: Tensor, how: SlidingWindow) -> Tensor:
    """Logits (1, K, h, w) of an image (1, 3, h, w): where windows overlap, their
    mean.
    """
    height, width = image.shape[2:]
    if how.window is None:
        return network(image)
    tall, wide = min(how.window, height), min(how.window, width)
    places = list(itertools.product(starts(height, tall, how.stride), starts(width, wide, how.stride)))
    total, seen = torch.zeros(0), image.new_zeros(height, width)
    for first in range(0, len(places), how.batch):
        corners = places[first : first + how.batch]
        logits = network(torch.cat([image[:, :, y : y + tall, x : x + wide] for y, x in corners]))
        if first == 0:
            total = logits.new_zeros(1, logits.shape[1], height, width)
        for (y, x), one in zip(corners, logits, strict=True):
            total[0, :, y : y + tall, x : x + wide] += one
            seen[y : y + tall, x : x + wide] += 1
    return total.div_(seen)


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride` pixels, the last one flush
    with the end.
    """
    last = side - window
    return [*range(0, last, stride), last]


def classes_at(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The highest of scores (K, h, w) at each pixel of a picture of `size`: (height,
    width) int64. Bilinear, strip by strip.
    """
    height, width = size
    if scores.shape[1:] == size:
        return scores.argmax(dim=0)
    rows = max(1, STRIP // (len(scores) * width))
    strips = [
        strip(scores, size, top, min(top + rows, height)).argmax(dim=0) for top in range(0, height, rows)
    ]
    return torch.cat(strips)


def strip(scores: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows `top` to `bottom` of scores (K, h, w) resized bilinearly to `size`: (K,
    rows, width).
    """
    h, (height, width) = scores.shape[1], size
    y = ((torch.arange(top, bottom, device=scores.device) + 0.5) * (h / height) - 0.5).clamp(min=0)
    above = y.long().clamp(max=h - 1)
    below, share = (above + 1).clamp(max=h - 1), (y - above)[:, None]
    rows = scores[:, above] * (1 - share) + scores[:, below] * share
    return F.interpolate(rows[None], size=(bottom - top, width), mode="bilinear", align_corners=False)[0]
