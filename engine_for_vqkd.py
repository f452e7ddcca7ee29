"""VQ-KD: one step of training the visual tokenizer, and what keeps its codebook in
use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.files import SampleDataset
from data_pipeline.samplers import Loader
from engine import Stage
from evaluation.held_out import evaluation_batches, pick_samples
from modeling_vqkd import VQKD
from monitoring import alarms, health
from monitoring.alarms import Found, Line
from monitoring.health import HealthProbe, Look
from monitoring.progress import Remark
from norm_ema_quantizer import FEATURES_PER_CODE, perplexity
from runtime import distributed
from runtime.device import Precision
from runtime.metrics import RunningMeans
from runtime.phases import FROZEN, phase
from runtime.terminal import log, say_if_slow
from visualization import drawing
from vqkd_teachers import Teacher

CALIBRATION_IMAGES = 512
OF_CODES = ("codes_used", "unused_code", "perplexity", "quant_loss")  # figures that need a codebook


class TokenizerStage(Stage):
    """Reconstruct the teacher's features from quantized codes (BEiT v2, section
    3.1).
    """

    def __init__(
        self,
        model: VQKD,
        teacher: Teacher,
        device: torch.device,
        precision: Precision,
        dataset: SampleDataset,
        held_out: Loader | None = None,
        quantizer_warmup_steps: int = 0,
        revive_dead_codes: bool = False,
        health_probe: HealthProbe | None = None,
    ) -> None:
        self.model, self.teacher, self.health_probe = model, teacher, health_probe
        super().__init__(device, precision)
        self.dataset, self.held_out = dataset, held_out
        self.warmup_steps, self.revive_dead_codes = quantizer_warmup_steps, revive_dead_codes
        if quantizer_warmup_steps > 0:
            model.quantize.gather_for_kmeans = FEATURES_PER_CODE * model.quantize.num_tokens

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        with phase(FROZEN):
            targets = self.teacher.targets(batch["image"])
        return model(batch["image"], targets)

    def before_step(self, step: int) -> None:
        self.model.quantize.warming_up = step < self.warmup_steps

    def start_epoch(self, epoch: int) -> None:
        self.model.quantize.start_epoch(self.revive_dead_codes)

    def remark(self, step: int) -> Remark | None:
        """That there are no codes yet."""
        if self.model.quantize.ready:
            return None
        if step <= self.warmup_steps:
            progress = f"step {step} of {self.warmup_steps}"
            text = f"warm-up of the quantizer: {progress}; it is bypassed, so there are no codes yet"
            return Remark(f"warm-up {progress}", text, OF_CODES)
        return Remark("no codes yet", "no codes yet: features are collected for k-means", OF_CODES)

    def more_figures(self) -> dict[str, float]:
        """Use of the codebook in the epoch so far; none while the quantizer is
        bypassed.
        """
        quantizer = self.model.quantize
        if not quantizer.ready or quantizer.warming_up:
            return {"codes_used": math.nan, "perplexity": math.nan}
        usage = quantizer.usage()
        return {name: usage[name] for name in ("codes_used", "perplexity")}

    def end_epoch(self) -> dict[str, float]:
        """Usage of the codebook in this epoch."""
        return self.model.quantize.usage()

    def find_alarms(self, line: Line, earlier: Sequence[Line], warmed_up: bool) -> Found:
        quantizer = self.model.quantize
        if not quantizer.ready or quantizer.warming_up:
            return {}
        found = alarms.codebook_use(
            line["train_codes_used"], line["train_perplexity"], quantizer.num_tokens, self.revive_dead_codes
        )
        return found | alarms.falling_rank("health_rank_mean", line, earlier)

    def has_extra_metrics(self, epoch: int) -> bool:
        return self.health_probe is not None and self.health_probe.is_due(epoch)

    @torch.no_grad()
    def extra_metrics(self, model: Any, epoch: int) -> dict[str, float]:
        """The encoder's health (`health_freq`), and, once there are codes, their use."""
        probe, quantizer = self.health_probe, self.model.quantize
        if probe is None:
            return {}
        model.eval()

        def look(batch: dict[str, Any]) -> Look:
            images = batch["image"]
            with self.precision.autocast():
                tokens = model.encoder.forward_features(model.pre_process(images), return_patch_tokens=True)
                codes = model.get_codebook_indices(images).flatten() if has_codes else None
            return Look({"mean": tokens.float().mean(dim=1)}, codes)

        has_codes = quantizer.ready and not quantizer.warming_up
        seen = probe.see(look, quantizer.num_tokens, self.device)
        figures = health.feature_figures(seen.features)
        if has_codes:
            figures["health_codes_used"] = int((seen.targets > 0).sum())
            figures["health_perplexity"] = perplexity(seen.targets.double())
        to_input = model.pre_process
        return figures | probe.attention_figures(model.encoder, self.device, self.precision, to_input)

    @torch.no_grad()
    @say_if_slow(f"teacher    measuring its channels over {CALIBRATION_IMAGES} images")
    def calibrate_targets(self) -> None:
        """Mean and std of the teacher's channels over a fixed sample of the training
        images, the same on every rank.
        """
        images = [sample["image"] for sample in pick_samples(self.dataset, CALIBRATION_IMAGES)]
        total = squares = torch.zeros((), device=self.device, dtype=torch.float64)
        rows = 0
        for start in range(0, len(images), 32):
            batch = torch.stack(images[start : start + 32]).to(self.device)
            features = self.teacher.targets(batch).double().flatten(0, 1)
            total, squares, rows = (
                total + features.sum(0),
                squares + features.square().sum(0),
                rows + len(features),
            )
        mean = total / max(rows, 1)
        std = (squares / max(rows, 1) - mean.square()).clamp(min=0).sqrt()
        # a channel that hardly moves must not be blown up
        std = std.clamp(min=0.01 * float(std.mean()) + 1e-12)
        self.model.target_mean.copy_(distributed.broadcast(mean.float()))
        self.model.target_std.copy_(distributed.broadcast(std.float()))
        log.info(f"teacher    channels standardized over {len(images)} images")

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        """Loss and codebook usage on held-out images; the codebook is not touched."""
        if self.held_out is None:
            return {}
        model.eval()
        means, counts = RunningMeans(), torch.zeros(self.model.quantize.num_tokens, device=self.device)
        for batch in evaluation_batches(self.held_out, self.device):
            image = batch["image"]
            with self.precision.autocast():
                loss, logs, codes = model.distill(image, self.teacher.targets(image))
            means.add({"loss": loss} | logs, weight=len(image))
            if self.model.quantize.ready:  # else there are no codes, as they say on the device (-1)
                counts.index_add_(0, codes, torch.ones_like(codes, dtype=torch.float32))
        distributed.all_reduce_sum(counts)
        self.held_out_counts = counts
        results = {f"test_{name}": value for name, value in means.compute(over_all_ranks=True).items()}
        return results | {"test_codes_used": int((counts > 0).sum())}

    @torch.no_grad()
    def pictures(self, model: Any, count: int = 8) -> dict[str, Tensor]:
        """Images over their token maps, and how evenly the codes are used; with captions."""
        images = [sample["image"] for sample in pick_samples(self.dataset, count)]
        if not images:
            return {}
        shown, large = [drawing.enlarge(drawing.as_rgb(image)) for image in images], drawing.LARGE_CAPTION
        if not self.model.quantize.ready:
            text = "warm-up of the quantizer: no codes yet"
            return {"tokens": drawing.add_caption(drawing.gallery(shown, 4), text, large)}
        model.eval()
        with self.precision.autocast():
            codes = model.get_codebook_indices(torch.stack(images).to(self.device)).cpu()
        grid, quantizer = model.encoder.patch_embed.patch_shape, model.quantize
        maps = [drawing.token_map(c.view(grid), quantizer.num_tokens, shown[0].shape[-2:]) for c in codes]
        rows = []
        for four in (slice(start, start + 4) for start in range(0, len(images), 4)):
            rows.append(drawing.add_caption(drawing.side_by_side(shown[four]), "images", large))
            rows.append(
                drawing.add_caption(drawing.side_by_side(maps[four]), "their codes, one color each", large)
            )
        usage, histogram = quantizer.usage(), drawing.usage_histogram(quantizer.cluster_size)
        histogram = drawing.add_caption(
            histogram, "how often each code is used, most used first (log scale)", large
        )
        used, perplexity = usage["codes_used"], usage["perplexity"]
        title = f"{used} of {quantizer.num_tokens} codes in use, perplexity {perplexity:.0f}"
        return {
            "tokens": drawing.stack_rows(rows),
            "codebook_usage": drawing.add_caption(histogram, title, large),
        }

    def state_dict(self) -> dict[str, Any]:
        """Features waiting for k-means and codes waiting for revival: a run killed in
        between goes on the same.
        """
        quantizer = self.model.quantize
        return {"collected": list(quantizer.collected), "dead": quantizer.dead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        quantizer = self.model.quantize
        quantizer.collected = [features.to(self.device) for features in state["collected"]]
        quantizer.dead = None if state["dead"] is None else state["dead"].to(self.device)
