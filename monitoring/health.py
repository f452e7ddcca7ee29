"""Is a network learning? Figures that need no labels, on the same images every few
epochs.

Shapes: n images, B of a batch, N patches, T = 1 + N tokens with CLS in front, C width,
H heads, K codes, M predicted patches of a batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.files import Files, View
from data_pipeline.samplers import Loader
from errors import count
from evaluation.held_out import evaluation_batches, pick_samples
from norm_ema_quantizer import perplexity
from runtime import distributed
from runtime.device import Precision
from runtime.terminal import log
from vit_backbone import Trunk

MOST_IMAGES = 2000
ATTENTION_IMAGES = 16
ATTENTION_NUMBERS = 2**25  # weights in memory at a time
DEAD = 0.01  # a channel that moves less, as a share of what the channels move on average
# An image costs two forward passes, with and without a mask, and one of the tokenizer;
# an image of training as much as three and one.
COST = 0.75
SHARE_OF_RUN = 0.02

# ── Figures ──


def effective_rank(features: Tensor) -> float:
    """RankMe of features (n, C), from 1 to min(n, C): exp of the entropy of the
    singular values, which are divided by their sum (Garrido et al. 2023, equation 1,
    without its epsilon). The features are not centered: if all are equal, it is 1. NaN
    where they are not finite, or all 0.
    """
    if not bool(torch.isfinite(features).all()):
        return math.nan
    values = torch.linalg.svdvals(features.cpu().double())
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def dead_feature_share(features: Tensor) -> float:
    """Of the channels of features (n, C), the share whose standard deviation over the
    images is at most a hundredth of the channels' mean standard deviation.
    """
    std = features.double().std(dim=0, correction=0)
    return float((std <= DEAD * std.mean()).double().mean())


def patch_distances(grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Between the centers of patches, in pixels, (N, N), row-major."""
    centers = torch.cartesian_prod(
        *(torch.arange(side, dtype=torch.float64) * size for side, size in zip(grid, patch_size, strict=True))
    )
    return torch.cdist(centers, centers)


def attention_distance(weights: Tensor, distances: Tensor) -> float:
    """How far patches look: the distance (N, N) from a patch to another, averaged with
    the attention weights (B, H, T, T), then over patches, heads and images (Dosovitskiy
    et al. 2021, appendix D.7). What goes to CLS counts for nothing: a patch's weights
    for the patches are divided by their sum.
    """
    of_patches = weights[..., 1:, 1:].double()
    among_patches = of_patches / of_patches.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    return float((among_patches * distances).sum(dim=-1).mean())


@torch.no_grad()
def attention_distances(model: Trunk, images: Tensor) -> list[float]:
    """attention_distance of each block on images (B, in_chans, height, width), as many
    at a time as memory allows.
    """
    embed, heads = model.patch_embed, model.blocks[0].attn.num_heads
    distances = patch_distances(embed.patch_shape, embed.patch_size).to(images.device)
    at_once = max(1, ATTENTION_NUMBERS // (heads * (embed.num_patches + 1) ** 2))
    sums = [0.0] * len(model.blocks)
    for some in images.split(at_once):
        tokens, bias = model.embed(some), model.shared_bias()
        for number, block in enumerate(model.blocks):
            weights = block.attention_weights(tokens, bias)
            sums[number] += attention_distance(weights, distances) * len(some) / len(images)
            tokens = block(tokens, bias)
    return sums


# ── During training ──


class Look(NamedTuple):
    """What is seen of a batch."""

    features: dict[str, Tensor]  # cls, mean: (B, C)
    targets: Tensor | None = None  # (M,) codes
    predicted: Tensor | None = None  # (M,) codes


class Seen(NamedTuple):
    """What was seen of all images, by all processes, on each of them."""

    features: dict[str, Tensor]  # (n, C), in main memory
    targets: Tensor  # (K,) how often each code was the target
    predicted: Tensor  # (K,) and the prediction
    correct: int  # predictions that are the target


@dataclass(frozen=True)
class HealthProbe:
    """What `health_freq` looks at: this process's share of the images, every so many
    epochs. `origin`: the parameter that names the images' folder, for messages.
    """

    loader: Loader
    every: int
    origin: str

    def is_due(self, epoch: int) -> bool:
        return (epoch + 1) % self.every == 0

    @torch.no_grad()
    def see(self, look: Callable[[dict[str, Any]], Look], n_codes: int, device: torch.device) -> Seen:
        features: dict[str, list[Tensor]] = {}
        counts = torch.zeros(3, max(n_codes, 1), dtype=torch.int64, device=device)
        for batch in evaluation_batches(self.loader, device, self.origin):
            seen = look(batch)
            for name, value in seen.features.items():
                features.setdefault(name, []).append(value.float())
            if seen.targets is not None:
                counts[0].index_add_(0, seen.targets, torch.ones_like(seen.targets))
            if seen.targets is not None and seen.predicted is not None:
                counts[1].index_add_(0, seen.predicted, torch.ones_like(seen.predicted))
                counts[2, 0] += (seen.predicted == seen.targets).sum()
        distributed.all_reduce_sum(counts)
        targets, predicted, correct = counts.cpu()
        return Seen(gather(features, device), targets, predicted, int(correct[0]))

    def attention_figures(
        self,
        model: Trunk,
        device: torch.device,
        precision: Precision,
        to_input: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> dict[str, float]:
        """`health_attention_distance_block_i` in pixels, i from 1, on a few images, the
        same ones in every process. `to_input`: what the model takes of these.
        """
        images = [sample["image"] for sample in pick_samples(self.loader.dataset, ATTENTION_IMAGES)]
        if not images:
            return {}
        with precision.autocast():
            found = attention_distances(model, to_input(torch.stack(images).to(device)))
        return {f"health_attention_distance_block_{block}": value for block, value in enumerate(found, 1)}


def gather(parts: dict[str, list[Tensor]], device: torch.device) -> dict[str, Tensor]:
    """The rows of all processes, in main memory; a process may be without an image."""
    shapes = {name: (0, rows[0].shape[1]) for name, rows in parts.items()}
    shapes = max(distributed.gather_objects(shapes), key=len)
    gathered = {}
    for name, shape in shapes.items():
        own = torch.cat(parts.get(name, [torch.zeros(shape, device=device)]))
        gathered[name] = distributed.all_gather_rows(own).cpu()
    return gathered


def build_probe(
    asked: int | None,
    held_out: Files | None,
    training: Files,
    epochs: int,
    build_loader: Callable[..., Loader],
    view: View | None = None,
) -> HealthProbe | None:
    """None where nothing is asked for, and where no look is cheap enough for a run of
    so few `epochs`.

    `asked`: epochs from one look to the next; None: as few as take SHARE_OF_RUN of the
    time. `held_out`: None: `training` images are looked at, if need be through another
    `view`. `build_loader(dataset, every=n)`: of this process's share of each n-th image.
    """
    dataset, name, origin = held_out, "held-out", "`eval_data_path`"
    if dataset is None:
        dataset, name, origin = copy.copy(training), "training", "`data_path`"
        dataset.view = view or dataset.view
    step = math.ceil(len(dataset) / MOST_IMAGES)
    images = -(-len(dataset) // step)
    every = math.ceil(COST * images / len(training) / SHARE_OF_RUN) if asked is None else asked
    if not 0 < every <= epochs:
        reason = "" if asked is not None else ", which would take over 2% of so short a run"
        log.info(f"health     not measured{reason} (`health_freq`)")
        return None
    how = "" if held_out is not None else ", each with one fixed crop, as no images are held out"
    log.info(f"health     every {count(every, 'epoch')}, on {images:,} {name} images{how}")
    return HealthProbe(build_loader(dataset, every=step), every, origin)


def feature_figures(features: dict[str, Tensor]) -> dict[str, float]:
    """`health_rank_*` of each kind of features, `health_dead_features` of the mean."""
    figures = {f"health_rank_{name}": effective_rank(values) for name, values in features.items()}
    return figures | {"health_dead_features": dead_feature_share(features["mean"])}


def prediction_figures(seen: Seen) -> dict[str, float]:
    """How far the accuracy of the predictions is above that of always naming the most
    frequent code, in points, and the perplexities of targets and predictions.
    """
    patches = max(int(seen.targets.sum()), 1)
    return {
        "health_mlm_margin": 100 * (seen.correct - int(seen.targets.max())) / patches,
        "health_perplexity_target": perplexity(seen.targets.double()),
        "health_perplexity_predicted": perplexity(seen.predicted.double()),
    }
