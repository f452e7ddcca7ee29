"""What a classifier is surest of, and wrong about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visualization import drawing


class ConfidentErrors:
    """The `count` images with the highest probability of a wrong class, kept on their
    device.
    """

    def __init__(self, count: int = 12) -> None:
        self.count = count
        self.images: Tensor | None = None
        self.found = torch.empty(0)  # of each: probability (0: no error), true class, predicted class

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Images (B, C, height, width), labels (B,), logits (B, classes); without
        reading from the device.
        """
        probability, predicted = logits.softmax(dim=1).max(dim=1)
        wrong = torch.where(predicted != labels, probability, 0)
        found = torch.stack((wrong, labels.to(wrong), predicted.to(wrong)), dim=1)
        most = found[:, 0].topk(min(self.count, len(found))).indices
        images, found = images[most], found[most]
        if self.images is not None:
            images, found = torch.cat((self.images, images)), torch.cat((self.found, found))
            most = found[:, 0].topk(min(self.count, len(found))).indices
            images, found = images[most], found[most]
        self.images, self.found = images, found

    def draw(
        self,
        classes: Sequence[str],
        mean_std: tuple[Sequence[float], Sequence[float]],
        columns: int = 3,
    ) -> Tensor | None:
        """A gallery, the surest error first; None without errors. `mean_std`: how the
        images are normalized.
        """
        if self.images is None:
            return None
        tiles = []
        for image, (probability, label, predicted) in zip(self.images, self.found.tolist(), strict=True):
            if probability > 0:
                true, wrong = (name_class(classes, int(number)) for number in (label, predicted))
                shown = drawing.enlarge(drawing.as_rgb(drawing.denormalize(image.float().cpu(), *mean_std)))
                below = drawing.add_caption(shown, f"as {wrong} {100 * probability:.0f}%")
                tiles.append(drawing.add_caption(below, true))
        if not tiles:
            return None
        title = "surest errors: true class, then predicted"
        return drawing.add_caption(drawing.gallery(tiles, columns), title, drawing.LARGE_CAPTION)


def name_class(classes: Sequence[str], number: int) -> str:
    return classes[number] if number < len(classes) else f"class {number}"
