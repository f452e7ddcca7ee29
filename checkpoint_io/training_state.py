"""All that changes while a network trains, and with it all that a checkpoint must
hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from checkpoint_io.optimizer_state import check_saved_state
from runtime import distributed, fsdp
from runtime.metrics import RunningMeans


@dataclass
class TrainState:
    model: nn.Module  # what is saved
    runner: nn.Module  # what is called: the model or its DDP wrapper
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    samples: int = 0  # of this epoch, over all ranks, already used
    step: int = 0  # optimizer steps of the whole run
    images: int = 0  # that these steps saw, over all ranks
    best_metric: float = -math.inf
    means: RunningMeans = field(default_factory=RunningMeans)
    skipped_in_a_row: int = 0
    skipped: int = 0  # steps of the whole run
    cooldown_start: int | None = None  # step of the schedule; None: no checkpoint was branched off from

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def position(self) -> tuple[int, int, int]:
        """(epoch, samples into it, step) at which training goes on."""
        return self.epoch, self.samples, self.step


def build_checkpoint(state: TrainState, epoch: int, means: list[dict[str, Any]]) -> dict[str, Any]:
    """`epoch`: the one the checkpoint is of. `means`: of every process, for its part of
    the epoch.
    """
    content = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "epoch": epoch,
        "next": {
            "epoch": state.epoch,
            "samples": state.samples,
            "step": state.step,
            "images": state.images,
        },
        "best": state.best_metric,
        "bad_in_a_row": state.skipped_in_a_row,
        "skipped": state.skipped,
        "means": means,
    }
    if state.cooldown_start is not None:
        content["cooldown_start"] = state.cooldown_start
    if state.ema is not None:
        content["model_ema"] = state.ema.module.state_dict()
    return content


def load_optimizer(state: TrainState, saved: Any, path: Path) -> None:
    """The moments of a checkpoint, each in memory of its own, laid out like its
    parameter. The settings (betas, layer decay, ...) stay this run's.
    """
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    optimizer = state.optimizer
    check_saved_state(saved, optimizer, names, str(path))
    settings = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(fsdp.shard_moments(saved, optimizer))
    for moments in optimizer.state.values():
        for key, value in moments.items():
            if isinstance(value, Tensor) and not fsdp.is_shard(value):  # shards are copies already
                moments[key] = value.clone(memory_format=torch.contiguous_format)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def load_progress(state: TrainState, content: dict[str, Any], device: torch.device) -> None:
    """Where training stands: all of a checkpoint but weights, moments and the stage's
    part.

    KeyError, TypeError, ValueError, AttributeError or RuntimeError: it is not complete.
    """
    if content["scaler"] and state.scaler.is_enabled():
        scale = float(content["scaler"]["scale"])
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"the gradient scaler's scale is {scale}")
        state.scaler.load_state_dict(content["scaler"])
    position = [content["next"][key] for key in ("epoch", "samples", "step")]
    if not all(isinstance(number, int) and number >= 0 for number in position):
        raise ValueError(f"epoch, samples, step: {position}")
    state.epoch, state.samples, state.step = position
    state.images = int(content["next"].get("images", state.step * images_per_step(content)))
    state.best_metric, state.skipped_in_a_row = float(content["best"]), int(content["bad_in_a_row"])
    state.skipped = int(content.get("skipped", 0))
    state.cooldown_start = content.get("cooldown_start")
    load_means(state.means, content["means"], device)


def images_per_step(content: dict[str, Any]) -> int:
    """As its flags say, for checkpoints of earlier code, which did not count images."""
    flags = content.get("args", {})
    return int(flags.get("batch_size", 0)) * int(flags.get("update_freq", 1)) * int(content["world_size"])


def load_means(means: RunningMeans, saved: Any, device: torch.device) -> None:
    """To each process its own, or to rank 0 the sum of all where there are others now.
    Earlier code kept those of rank 0 alone.
    """
    parts = [saved] if isinstance(saved, dict) else list(saved)
    if len(parts) == distributed.world_size():
        means.load_state_dict(parts[distributed.rank()], device)
    elif distributed.is_main():
        filled = [part for part in parts if part["sums"] is not None]
        if filled:
            total = {key: sum_up([part.get(key) for part in filled]) for key in ("sums", "reported")}
            means.load_state_dict({"names": filled[0]["names"], **total}, device)


def sum_up(parts: list[Tensor | None]) -> Tensor | None:
    """None without a part that is one."""
    there = [part for part in parts if part is not None]
    return torch.stack(there).sum(0) if there else None
