"""What is measured: running means that stay on the device, accuracy, PSNR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime import distributed


class RunningMeans:
    """Means of scalar tensors by name; adding them never reads them back, so it never
    synchronizes the device.

    The names must be the same at every `add`. Values that are not finite are left out
    of their mean.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # (2, names): sums and counts
        self.reported: Tensor | None = None  # the sums at the last report

    def add(self, values: dict[str, Tensor], weight: float = 1.0) -> None:
        """`weight`: how many images (or patches) the values are the mean of, where
        batches differ in size.
        """
        row = torch.stack([value.detach().float() for value in values.values()])
        fine = torch.isfinite(row)
        new = weight * torch.stack((torch.where(fine, row, 0.0), fine.float())).double()
        if self.sums is None:
            self.names, self.sums = list(values), new
        else:
            self.sums += new

    def compute(self, over_all_ranks: bool = False) -> dict[str, float]:
        """Name -> mean, with one synchronization for all of them. A rank that added
        nothing takes part all the same.
        """
        names, sums = self.names, torch.zeros(0) if self.sums is None else self.sums.clone()
        if over_all_ranks and distributed.world_size() > 1:
            # Through the host: a rank without a batch knows neither the names nor the
            # device.
            everyone = distributed.gather_objects((names, sums.tolist()))
            names = next((theirs for theirs, _ in everyone if theirs), [])
            sums = sum(
                (torch.tensor(theirs, dtype=torch.float64) for has, theirs in everyone if has),
                torch.zeros(2, len(names)),
            )
        return divide(names, sums)

    def compute_new(self) -> dict[str, float]:
        """Name -> mean in this process since `report`, with one synchronization."""
        if self.sums is None:
            return {}
        return divide(self.names, self.sums if self.reported is None else self.sums - self.reported)

    def report(self) -> dict[str, float]:
        """Those of `compute_new`, which begin anew here."""
        means = self.compute_new()
        self.reported = None if self.sums is None else self.sums.clone()
        return means

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors on the CPU."""
        sums, reported = (None if value is None else value.cpu() for value in (self.sums, self.reported))
        return {"names": self.names, "sums": sums, "reported": reported}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Undo state_dict; earlier code kept no `reported`."""
        self.names = list(state["names"])
        sums, reported = state["sums"], state.get("reported", state["sums"])
        self.sums = None if sums is None else sums.to(device)
        self.reported = None if reported is None else reported.to(device)


def divide(names: list[str], sums: Tensor) -> dict[str, float]:
    """Means from sums and counts (2, names); NaN of nothing."""
    if not names:
        return {}
    totals, counts = sums.tolist()
    return {name: t / c if c else float("nan") for name, t, c in zip(names, totals, counts, strict=True)}


def top_k_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many of labels (B,) are among the k highest logits (B, classes): a scalar
    tensor.
    """
    k = min(k, logits.shape[1])
    return (logits.topk(k, dim=1).indices == labels[:, None]).sum()


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of rows whose highest logit is the target; targets are indices (M,) or
    probabilities (M, classes).
    """
    if targets.ndim == 2:
        targets = targets.argmax(dim=1)
    return (logits.argmax(dim=1) == targets).float().mean()


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images (B, 3, height, width) in [0,
    1]: (B,), in dB; equal ones have 100.
    """
    error = (images.float() - others.float()).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()
