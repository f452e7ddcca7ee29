"""What tokens keep: one step of training a pixel decoder on the codes of a frozen
tokenizer, and its PSNR.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.files import SampleDataset
from data_pipeline.samplers import Loader
from engine import Stage
from evaluation.held_out import average_steps, evaluation_batches, pick_samples
from runtime.device import Precision
from runtime.metrics import psnr
from visualization import drawing


class PixelDecoderStage(Stage):
    """Draw each image from its codes; mean absolute error.

    PSNR (dB, the mean over images) stands beside that of an image's mean color, which
    takes no token to tell.
    """

    def __init__(
        self, device: torch.device, precision: Precision, shown: SampleDataset, held_out: Loader | None = None
    ) -> None:
        super().__init__(device, precision)
        self.shown, self.held_out = shown, held_out

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return compare(model(batch["image"]), batch["image"])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        if self.held_out is None:
            return {}
        batches = evaluation_batches(self.held_out, self.device)
        return average_steps(self.step, model, batches, self.precision, lambda batch: len(batch["image"]))

    def best_metric(self, test: dict[str, float]) -> float | None:
        return test.get("test_psnr")

    @torch.no_grad()
    def pictures(self, model: Any, count: int = 8) -> dict[str, Tensor]:
        """Images, their token maps, and what was drawn from the tokens."""
        images = [sample["image"] for sample in pick_samples(self.shown, count)]
        if not images:
            return {}
        model.eval()
        with self.precision.autocast():
            codes = model.encode(torch.stack(images).to(self.device))
            drawn = model.decode(codes)
        picture = drawing.draw_reconstructions(images, codes, model.n_codes, list(drawn))
        return {
            "reconstruction": drawing.add_caption(
                picture, "images, their codes, and what is drawn from the codes", drawing.LARGE_CAPTION
            )
        }


def compare(drawn: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Images (B, C, height, width) in [0, 1] -> (loss (), means over the batch of the
    measures).
    """
    loss = F.l1_loss(drawn, images)
    mean_color = images.mean(dim=(2, 3), keepdim=True)
    return loss, {
        "psnr": psnr(drawn.detach(), images).mean(),
        "psnr_mean_color": psnr(mean_color, images).mean(),
    }
