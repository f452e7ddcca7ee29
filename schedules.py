"""Learning rate and weight decay over a run: pure functions of its optimizer steps."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from errors import ParameterError


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: float = 0,
    start_warmup_value: float = 0,
    warmup_steps: int = -1,
) -> np.ndarray:
    """One value per optimizer step: linear warm-up that includes its endpoint, then
    half a cosine to `final_value`.

    warmup_steps > 0 replaces warmup_epochs * niter_per_ep. A warm-up longer than the
    run is cut at the run's end.
    """
    total = epochs * niter_per_ep
    warmup = warmup_steps if warmup_steps > 0 else int(warmup_epochs * niter_per_ep)
    rise = np.linspace(start_warmup_value, base_value, warmup)
    n = max(total - warmup, 0)
    fall = [
        final_value + 0.5 * (base_value - final_value) * (1 + math.cos(math.pi * i / n)) for i in range(n)
    ]
    return np.concatenate((rise, np.array(fall)))[:total]


def poly_scheduler(
    base_value: float, final_value: float, steps: int, warmup_steps: int = 0, power: float = 1.0
) -> np.ndarray:
    """One value per optimizer step: base * (1 - step / steps) ** power down to
    `final_value`, while a linear warm-up from (nearly) 0 multiplies it (semantic
    segmentation's recipes).
    """
    step = np.arange(steps)
    fall = final_value + (base_value - final_value) * (1 - step / steps) ** power
    return fall * np.clip(step / max(warmup_steps, 1), 1e-6, 1.0) if warmup_steps > 0 else fall


def constant_scheduler(value: float, steps: int, warmup_steps: int = 0) -> np.ndarray:
    """One value per optimizer step: the warm-up of cosine_scheduler, then always
    `value`.
    """
    rise = np.linspace(0, value, warmup_steps)
    return np.concatenate((rise, np.full(max(steps - warmup_steps, 0), value)))[:steps]


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay for every optimizer step of the run.

    `in_steps`: the run is counted in optimizer steps, whatever an epoch is; else in
    epochs, whatever a step is.
    """

    lr: np.ndarray
    weight_decay: np.ndarray
    in_steps: bool = False
    min_lr: float = 0.0  # where a cool-down ends
    freeze_steps: int = 0  # the first ones, in which groups named "frozen_..." do not learn

    def hold(self, steps: int) -> Schedule:
        """Each value for so many steps, instead of one."""
        return replace(self, lr=self.lr.repeat(steps), weight_decay=self.weight_decay.repeat(steps))

    def cool_down(self, start: int) -> Schedule:
        """The same up to step `start`; from there to the end the constant rate falls to
        `min_lr` as 1 - sqrt(t) (Hägele et al. 2024, section 3).

        ParameterError: no steps are left, or the rate is not constant there.
        """
        peak, steps = float(self.lr.max()), len(self.lr) - start
        if steps <= 0:
            raise ParameterError(
                f"`epochs` end at step {len(self.lr)}, and the cool-down starts at step {start}: give more"
            )
        if (self.lr[start:] != peak).any():
            raise ParameterError(
                f"the cool-down starts at step {start}, where the learning rate is not constant: it needs "
                "`schedule` wsd, and a warm-up that ends before"
            )
        fall = [self.min_lr + (peak - self.min_lr) * (1 - math.sqrt(i / steps)) for i in range(steps)]
        return replace(self, lr=np.concatenate((self.lr[:start], np.array(fall))))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the groups' values for optimizer step `step` of the run."""
        step = min(step, len(self.lr) - 1)
        for group in optimizer.param_groups:
            frozen = step < self.freeze_steps and group["name"].startswith("frozen_")
            group["lr"] = 0.0 if frozen else float(self.lr[step]) * group["lr_scale"]
            if not group["name"].endswith("no_decay"):
                group["weight_decay"] = float(self.weight_decay[step])


@dataclass(frozen=True)
class ScheduleOptions:
    """Flags of the same names."""

    epochs: int
    min_lr: float
    warmup_epochs: float
    warmup_steps: int  # above 0: replaces warmup_epochs
    weight_decay: float
    weight_decay_end: float | None  # None: the weight decay is constant
    schedule: str = "cosine"  # or "wsd": constant after the warm-up
    cooldown_epochs: int = 0  # of "wsd": the last ones
    freeze_epochs: int = 0


def build_schedule(options: ScheduleOptions, lr: float, steps_per_epoch: int) -> Schedule:
    """`lr` is the peak."""
    steps = options.epochs * steps_per_epoch
    warmup = (
        options.warmup_steps if options.warmup_steps > 0 else int(options.warmup_epochs * steps_per_epoch)
    )
    if options.warmup_steps >= steps:
        raise ParameterError(
            f"`warmup_steps` {options.warmup_steps} is as long as the run of {steps} steps "
            f"({options.epochs} epochs of {steps_per_epoch}): shorten it or raise `epochs`"
        )
    if warmup >= steps:
        logging.getLogger("beit").warning(
            f"warning: the warm-up ({warmup} steps) is as long as the run ({steps} steps): the learning "
            "rate only rises; lower `warmup_epochs`"
        )
    decay = options.weight_decay
    decay_end = decay if options.weight_decay_end is None else options.weight_decay_end
    shape = (options.epochs, steps_per_epoch)
    if options.schedule == "wsd":
        rates = constant_scheduler(lr, steps, warmup)
    else:
        rates = cosine_scheduler(
            lr, options.min_lr, *shape, warmup_epochs=options.warmup_epochs, warmup_steps=options.warmup_steps
        )
    schedule = Schedule(
        rates,
        cosine_scheduler(decay, decay_end, *shape),
        min_lr=options.min_lr,
        freeze_steps=options.freeze_epochs * steps_per_epoch,
    )
    cooldown = options.cooldown_epochs * steps_per_epoch
    return schedule.cool_down(steps - cooldown) if cooldown else schedule


def build_poly_schedule(
    lr: float, min_lr: float, max_steps: int, warmup_steps: int, poly_power: float, weight_decay: float
) -> Schedule:
    """A run that is counted in optimizer steps; `lr` is the peak."""
    if warmup_steps >= max_steps:
        raise ParameterError(
            f"`warmup_steps` {warmup_steps} is as long as the run of `max_steps` {max_steps}: shorten it, "
            "or give 0"
        )
    return Schedule(
        poly_scheduler(lr, min_lr, max_steps, warmup_steps, poly_power),
        np.full(max_steps, weight_decay),
        in_steps=True,
    )
