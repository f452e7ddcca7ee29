"""Steps that were skipped because their loss or gradient was not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from runtime import distributed
from runtime.terminal import log

MOST_IN_A_ROW = 10
LEAST_LOSS_SCALE = 2.0**-10


class SkippedSteps:
    """Names the steps that were skipped, and gives up after ten in a row.

    The flags stay on the device until `check`, which reads them all at once.

    Args:
        state: the run's TrainState: its step, scaler and count of skipped steps.
        last_good: the checkpoint to go back to; beside it the last batch is described.
        seed: of the run, for that description.
    """

    def __init__(self, state: Any, last_good: Path | None, seed: int) -> None:
        self.state, self.last_good, self.seed = state, last_good, seed
        self.pending: list[tuple[int, Tensor]] = []
        self.last_batches: list[dict[str, Any]] = []

    def add(self, loss: Tensor, norm: Tensor, micro_batches: list[dict[str, Any]]) -> None:
        self.last_batches = micro_batches
        # With a gradient scaler an overflowing gradient is part of the search for the
        # scale; only the loss counts.
        value = loss if self.state.scaler.is_enabled() else norm + loss
        self.pending.append((self.state.step, ~torch.isfinite(value)))

    def raise_if_stuck(self) -> None:
        """UserError after ten in a row, or when fp16 finds no scale that works."""
        if not self.pending:
            return
        flags = torch.stack([flag for _, flag in self.pending]).float()
        distributed.all_reduce_sum(flags)  # so that all ranks come to the same decision
        for (step, _), skipped in zip(self.pending, flags.tolist(), strict=True):
            self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if skipped else 0
            if skipped:
                self.state.skipped += 1
                log.warning(f"warning: step {step} was skipped: its loss or gradient is not finite")
            if self.state.skipped_in_a_row >= MOST_IN_A_ROW:
                self.give_up(step)
        self.pending.clear()
        if self.state.scaler.is_enabled() and self.state.scaler.get_scale() < LEAST_LOSS_SCALE:
            raise UserError(
                "the gradients are not finite in fp16 however small the loss is scaled; the last step that "
                "counted is in the checkpoint. Lower `lr`, set `clip_grad` 3.0, or try `amp_dtype` fp32"
            )

    def give_up(self, step: int) -> None:
        """End the run. The last good state is in the checkpoint; what is needed to look
        at the last batch is written beside it.
        """
        kept = "there is no `output_dir`, so nothing was kept"
        if self.last_good is not None:
            position = {"epoch": self.state.epoch, "step": step, "seed": self.seed}
            batches = [describe_batch(batch) for batch in self.last_batches]
            path = self.last_good.parent / f"bad_batch-rank{distributed.rank()}.json"
            path.write_text(json.dumps(position | {"last_micro_batches": batches}, indent=1) + "\n")
            kept = f"the last good checkpoint is {self.last_good}, the last batch is described in {path}"
        raise UserError(
            f"{MOST_IN_A_ROW} steps in a row, up to step {step}, had a loss or gradient that is not finite; "
            f"they changed nothing: {kept}. Lower `lr`, set `clip_grad` 3.0, lengthen `warmup_epochs`, or "
            "try `amp_dtype` fp32"
        )


def describe_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Which samples these are (dataset[epoch, index] gives them again), and statistics
    of each tensor.
    """
    described: dict[str, Any] = {"indices": batch["index"].tolist()}
    for name, value in batch.items():
        if isinstance(value, Tensor) and name != "index":
            x = value.detach().float()
            finite = bool(torch.isfinite(x).all())
            numbers = (
                {"min": float(x.min()), "max": float(x.max()), "mean": float(x.mean())} if finite else {}
            )
            described[name] = {"shape": list(value.shape), "finite": finite, **numbers}
    return described
