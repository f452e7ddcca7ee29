"""k nearest neighbors on frozen features (weighted as in Wu et al. 2018, instance
discrimination, and DINO).

What a backbone has learned, without training anything on top: a validation image gets
the class that its nearest training images vote for. Shapes: N training images, B a
batch, T = 1 + patches tokens with CLS in front, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.samplers import Loader
from runtime import distributed
from runtime.terminal import log

SIMILARITIES = 2**27  # computed at a time: 512 MiB


def pool(tokens: Tensor, features: str, num_prefix_tokens: int = 1) -> Tensor:
    """Tokens (B, T, C) -> `cls`: the CLS token (B, C); `mean`: of the patch tokens (B,
    C); `cls_mean`: both (B, 2C); `patches`: these tokens as they are (B, N, C).

    `num_prefix_tokens`: before the patches, CLS and registers.
    """
    patches = tokens[:, num_prefix_tokens:]
    parts = {"cls": lambda: tokens[:, 0], "mean": lambda: patches.mean(dim=1), "patches": lambda: patches}
    return torch.cat([parts[part]() for part in features.split("_")], dim=-1)


def channel_std(mean: Tensor, var: Tensor) -> Tensor:
    """Standard deviations (..., C) to divide by. Below a millionth of the largest
    channel is rounding: it stays small.
    """
    std = var.clamp_min(0).sqrt()
    least = 1e-6 * (mean.abs() + std).amax(dim=-1, keepdim=True)
    return torch.maximum(std, least.clamp_min(1e-12))


# ── Features of a whole data set ──


@dataclass(frozen=True)
class Features:
    """Of n images, in main memory: values (n, ...), labels (n,) and indices into the
    data set (n,), both int64.
    """

    values: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)


@torch.no_grad()
def extract(batches: Iterable[dict[str, Any]], encode: Callable[[Tensor], Tensor]) -> Features:
    """`encode` of every image of this rank's batches, (B, ...) each, in single
    precision.
    """
    parts = [(encode(b["image"]).float().cpu(), b["label"].cpu(), b["index"].cpu()) for b in batches]
    if not parts:  # fewer images than ranks
        none = torch.zeros(0, dtype=torch.int64)
        return Features(torch.zeros(0), none, none)
    values, labels, index = (torch.cat(column) for column in zip(*parts, strict=True))
    return Features(values, labels, index)


def gather_features(own: Features, device: torch.device, rows: int = 4096) -> Features:
    """The features of all ranks on every rank, in the order of the data set. `rows`
    pass through `device` at a time.
    """
    # a rank may be without an image
    shape = max(distributed.gather_objects(tuple(own.values.shape[1:])), key=len)
    longest = max(distributed.gather_objects(len(own)))
    columns = []
    for column in (own.values.reshape(-1, *shape), own.labels, own.index):
        pieces = (column[start : start + rows].to(device) for start in range(0, longest, rows))
        columns.append(torch.cat([distributed.all_gather_rows(piece).cpu() for piece in pieces]))
    values, labels, index = columns
    order = index.argsort()
    return Features(values[order], labels[order], index[order])


# ── Neighbors ──


@torch.no_grad()
def knn_accuracies(
    train: Features,
    own: Features,
    classes: int,
    device: torch.device,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    standardize: bool = False,
) -> dict[str, float]:
    """Accuracy in percent: {"knn10_acc1": ..., "knn10_acc5": ..., ...} and
    "knn_images".

    `train`: of all ranks, values (N, C); `own`: this rank's share of the validation
    images, each image on one rank. The k neighbors of highest cosine similarity vote
    for their class with exp(similarity / temperature). `standardize`: each channel gets
    the training images' mean 0 and standard deviation 1 first.
    """
    if max(ks) > len(train):
        log.info(f"k-NN       there are {len(train)} training images: k is cut to that")
    bank, queries = train.values, own.values.reshape(-1, *train.values.shape[1:])
    if standardize:
        mean = bank.mean(dim=0)
        std = channel_std(mean, bank.var(dim=0, correction=0))
        bank, queries = (bank - mean) / std, (queries - mean) / std
    bank, labels = F.normalize(bank, dim=-1).to(device), train.labels.to(device)
    counts = torch.zeros(len(ks), 2, device=device)
    step = min(1024, max(1, SIMILARITIES // max(len(bank), classes)))
    for start in range(0, len(own), step):
        query = F.normalize(queries[start : start + step], dim=-1).to(device)
        similar, nearest = (query @ bank.T).topk(min(max(ks), len(bank)), dim=1)
        weights, voters = (similar / temperature).exp(), labels[nearest]
        truth = own.labels[start : start + step].to(device)
        for row, k in enumerate(ks):
            votes = weights.new_zeros(len(query), classes).scatter_add_(1, voters[:, :k], weights[:, :k])
            ranks = rank_labels(votes, truth)
            counts[row] += torch.stack(((ranks < 1).sum(), (ranks < 5).sum()))
    images = torch.tensor(float(len(own)), device=device)
    distributed.all_reduce_sum(counts, images)
    results: dict[str, float] = {}
    for k, (top1, top5) in zip(ks, (100 * counts / images.clamp(min=1)).tolist(), strict=True):
        results |= {f"knn{k}_acc1": top1, f"knn{k}_acc5": top5}
    return results | {"knn_images": int(images)}


def rank_labels(votes: Tensor, labels: Tensor) -> Tensor:
    """Place of each label (B,) among the votes (B, classes), from 0; of equal votes the
    lower class comes first.

    A class without a vote is last, also where fewer than five classes were voted for.
    """
    own = votes.gather(1, labels[:, None])
    lower = torch.arange(votes.shape[1], device=votes.device) < labels[:, None]
    ranks = ((votes > own) | ((votes == own) & lower)).sum(dim=1)
    return torch.where(own[:, 0] > 0, ranks, votes.shape[1] + 5)


# ── During pretraining ──


@dataclass(frozen=True)
class Probe:
    """What `knn_freq` evaluates on: this rank's share of labeled images, every so many
    epochs.
    """

    train: Loader
    validation: Loader
    classes: int
    every: int
    temperature: float
    standardize: bool

    def is_due(self, epoch: int) -> bool:
        return (epoch + 1) % self.every == 0

    def measure(self, train: Features, own: Features, device: torch.device) -> dict[str, float]:
        """test_knn_acc1 (k = 20) and test_knn10_acc1, from this rank's shares."""
        found = knn_accuracies(
            gather_features(train, device),
            own,
            self.classes,
            device,
            (10, 20),
            self.temperature,
            self.standardize,
        )
        return {"test_knn_acc1": found["knn20_acc1"], "test_knn10_acc1": found["knn10_acc1"]}
