"""Vector quantizer on the unit sphere whose codebook follows its codes' features by
exponential moving average.

VQ-KD (BEiT v2, section 3.1). Shapes: B batch, h x w grid, M = B * h * w features, K
codes, D code dim. Every rank holds the same codebook at every step: counts, sums and
k-means see the features of all ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from layers.codebook_search import ROWS_PER_CHUNK, nearest_codes
from runtime import distributed
from runtime.terminal import log

FEATURES_PER_CODE = 16  # k-means after a warm-up waits until this many features per code are available


def l2_normalize(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


class Codebook(nn.Module):
    """The codes, and two published buffers, `cluster_size` and `embed_avg`, which are
    kept only for the state dict's compatibility.
    """

    weight: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor

    def __init__(self, n_codes: int, code_dim: int, initialized: bool) -> None:
        super().__init__()
        weight = (
            l2_normalize(torch.randn(n_codes, code_dim)) if initialized else torch.zeros(n_codes, code_dim)
        )
        self.register_buffer("weight", weight)
        self.register_buffer("cluster_size", torch.zeros(n_codes))
        self.register_buffer("embed_avg", weight.clone())
        self.register_buffer("initted", torch.tensor([float(initialized)]))


class NormEMAVectorQuantizer(nn.Module):
    """Features are replaced by the code of highest cosine similarity.

    Args:
        n_embed, embedding_dim: K and D.
        beta: weight of the commitment loss.
        decay: of the codes' moving average and of the usage statistic.
        eps: kept for the published signature; the codes need no smoothing since they
        are unit vectors.
        statistic_code_usage: keep `cluster_size`, a moving average (of that decay) of
            how often each code is used, which starts at zero with each epoch.
        kmeans_init: initialize the codebook by cosine k-means on the first features.
    """

    cluster_size: Tensor

    def __init__(
        self,
        n_embed: int,
        embedding_dim: int,
        beta: float = 1.0,
        decay: float = 0.99,
        eps: float = 1e-5,
        statistic_code_usage: bool = True,
        kmeans_init: bool = False,
    ) -> None:
        super().__init__()
        self.num_tokens, self.codebook_dim = n_embed, embedding_dim
        self.beta, self.decay, self.eps = beta, decay, eps
        self.statistic_code_usage = statistic_code_usage
        self.embedding = Codebook(n_embed, embedding_dim, initialized=not kmeans_init)
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        # host-side copy of embedding.initted: asking the device would synchronize it
        self.ready = not kmeans_init
        self.warming_up = False  # set by the training stage: features pass unquantized
        self.gather_for_kmeans = 0  # features to collect before k-means; 0 = the first batch, as published
        self.collected: list[Tensor] = []
        self.dead: Tensor | None = None  # (K,) bool, codes to revive in the next training step
        self.register_load_state_dict_post_hook(lambda module, _: module.sync_ready())

    def sync_ready(self) -> None:
        self.ready = bool(self.embedding.initted.item())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, D, h, w) -> (z_q (B, D, h, w), loss (), indices (M,) int64).

        The gradient passes straight through to the unit-length features. While the
        codebook is not initialized (before k-means) the features themselves come out,
        with loss 0 and indices -1.
        """
        with torch.autocast(z.device.type, enabled=False):
            features = l2_normalize(rearrange(z.float(), "b d h w -> b h w d").contiguous())
            flat = features.flatten(0, 2)  # (M, D)
            if self.training and not self.ready and not self.warming_up:
                self.initialize(flat.detach())
            if not self.ready or (self.training and self.warming_up):
                unquantized = rearrange(features, "b h w d -> b d h w")
                return unquantized, flat.new_zeros(()), flat.new_full((len(flat),), -1, dtype=torch.int64)
            if self.training and self.dead is not None:
                self.revive(flat.detach())
            indices = self.nearest(flat)
            codes = F.embedding(indices, self.embedding.weight).view_as(features)
            if self.training:
                self.update(flat.detach(), indices)
            loss = self.beta * F.mse_loss(features, codes)
            codes = features + (codes - features).detach()
        return rearrange(codes, "b h w d -> b d h w"), loss, indices

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """Unit features (M, D) -> index of the most similar code (M,), always in
        fp32.
        """
        with torch.autocast(features.device.type, enabled=False):
            return nearest_codes(features.float(), self.embedding.weight.float())

    @torch.no_grad()
    def update(self, features: Tensor, indices: Tensor) -> None:
        """Move used codes toward the mean direction of their features; unused codes
        keep theirs.
        """
        counts, sums = count_and_sum(features, indices, self.num_tokens)
        distributed.all_reduce_sum(counts, sums)
        used = counts > 0
        means = l2_normalize(sums / counts.clamp(min=1)[:, None])
        moved = l2_normalize(self.decay * self.embedding.weight + (1 - self.decay) * means)
        usage = self.decay * self.cluster_size + (1 - self.decay) * counts
        # A batch with non-finite features must not poison the codebook; decided on the
        # device, the same on all ranks.
        sound = torch.isfinite(sums.sum())
        self.embedding.weight.copy_(torch.where(sound & used[:, None], moved, self.embedding.weight))
        if self.statistic_code_usage:
            self.cluster_size.copy_(torch.where(sound, usage, self.cluster_size))

    @torch.no_grad()
    def initialize(self, features: Tensor) -> None:
        """Cosine k-means on the features of all ranks, the same everywhere; may wait
        for more batches.
        """
        self.collected.append(distributed.all_gather_rows(features))
        gathered = torch.cat(self.collected)
        if len(gathered) < self.gather_for_kmeans:
            return
        gathered = gathered[torch.isfinite(gathered).all(dim=1)]
        if len(gathered) == 0:
            return
        log.info(f"k-means    of {len(gathered):,} features gives the {self.num_tokens:,} codes")
        codes = cosine_kmeans(gathered, self.num_tokens)
        self.embedding.weight.copy_(distributed.broadcast(codes))
        self.embedding.initted.fill_(1)
        self.ready, self.collected = True, []

    def start_epoch(self, revive_dead_codes: bool = False) -> None:
        """Usage is counted from zero in each epoch; codes that the last epoch never
        used may be placed on live features.
        """
        if revive_dead_codes and self.ready and bool(self.cluster_size.any()):
            self.dead = self.cluster_size == 0
        self.cluster_size.zero_()

    @torch.no_grad()
    def revive(self, features: Tensor) -> None:
        """Put each dead code on the feature, among all ranks' in this batch, that the
        live codes serve worst.
        """
        dead, self.dead = self.dead, None
        if dead is None or not bool(dead.any()):
            return
        gathered = distributed.all_gather_rows(features)
        live = self.embedding.weight[~dead].t()
        similarity = torch.cat([(part @ live).amax(dim=1) for part in gathered.split(ROWS_PER_CHUNK)])
        worst = similarity.nan_to_num(nan=1.0).argsort(stable=True)[: int(dead.sum())]
        targets = dead.nonzero().squeeze(1)[: len(worst)]
        weight = self.embedding.weight.clone()
        weight[targets] = gathered[worst]
        self.embedding.weight.copy_(distributed.broadcast(weight))

    def usage(self) -> dict[str, float]:
        """Codes used since start_epoch, and the perplexity exp(entropy) of their use,
        over about the last 1 / (1 - decay) batches. Synchronizes the device once.
        """
        used, evenness = torch.stack(
            ((self.cluster_size > 0).sum().float(), perplexity_on_device(self.cluster_size))
        ).tolist()
        return {
            "codes_used": int(used),
            "unused_code": self.num_tokens - int(used),
            "perplexity": evenness,
        }


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of how often each code (K,) is used: the number of equally used
    codes with the same entropy. 0 without any.
    """
    return float(perplexity_on_device(counts))


def perplexity_on_device(counts: Tensor) -> Tensor:
    """`perplexity` as a scalar tensor, not read yet."""
    total = counts.sum()
    shares = counts / total.clamp(min=1e-12)
    return torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()) * (total > 0)


def count_and_sum(features: Tensor, indices: Tensor, n_codes: int) -> tuple[Tensor, Tensor]:
    """Features (M, D) by code: counts (K,) and sums (K, D), without a one-hot matrix
    and without a synchronization.
    """
    counts = features.new_zeros(n_codes).index_add_(0, indices, features.new_ones(len(indices)))
    sums = features.new_zeros(n_codes, features.shape[1]).index_add_(0, indices, features)
    return counts, sums


@torch.no_grad()
def cosine_kmeans(features: Tensor, n_codes: int, rounds: int = 10) -> Tensor:
    """Unit features (M, D) -> unit centers (K, D).

    With fewer features than codes every feature becomes a center and the rest are
    random directions: drawing with replacement, as the published code does, would
    duplicate codes, and only one of two equal codes is ever used.
    """
    generator = torch.Generator().manual_seed(0)
    distinct = torch.unique(features, dim=0)
    order = torch.randperm(len(distinct), generator=generator)[:n_codes]
    centers = distinct[order.to(features.device)]
    missing = n_codes - len(centers)
    if missing > 0:
        random = torch.randn(missing, features.shape[1], generator=generator).to(features)
        return torch.cat((centers, l2_normalize(random)))
    for _ in range(rounds):
        counts, sums = count_and_sum(features, nearest_codes(features, centers), n_codes)
        centers = torch.where(counts[:, None] > 0, l2_normalize(sums), centers)
    return centers
