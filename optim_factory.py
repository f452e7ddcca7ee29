"""Parameter groups, layer-wise learning rates, optimizers and schedules. Groups and
schedules are pure functions.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from errors import ParameterError, UserError


def get_num_layer_for_vit(name: str, num_max_layer: int) -> int:
    """Which layer a parameter belongs to: 0 embeddings and tokens, i + 1 block i,
    num_max_layer - 1 all the rest.
    """
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return num_max_layer - 1


class LayerDecayValueAssigner:
    """Learning-rate factor per layer; `values` runs from the embeddings (0) to the head
    (last).
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.values = list(values)

    def get_scale(self, layer: int) -> float:
        return self.values[layer]

    def get_layer_id(self, name: str) -> int:
        return get_num_layer_for_vit(name, len(self.values))


def layer_decay_values(decay: float, depth: int) -> list[float]:
    """decay ** (L + 1 - layer) for the layers 0 .. L + 1 of a model with L blocks."""
    return [decay ** (depth + 1 - layer) for layer in range(depth + 2)]


def get_parameter_groups(
    model: nn.Module,
    weight_decay: float = 1e-5,
    skip_list: Iterable[str] = (),
    get_num_layer: Callable[[str], int] | None = None,
    get_layer_scale: Callable[[int], float] | None = None,
) -> list[dict[str, Any]]:
    """Groups `[layer_i_]{decay,no_decay}` in the order in which the parameters first
    meet them.

    No weight decay for 1-d parameters, biases and the names in `skip_list`. Each group
    carries `weight_decay` and `lr_scale`; the training loop multiplies the scheduled
    rate by the latter.
    """
    skipped = set(skip_list)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bare = parameter.ndim <= 1 or name.endswith(".bias") or name in skipped
        group, decay = ("no_decay", 0.0) if bare else ("decay", weight_decay)
        layer = get_num_layer(name) if get_num_layer is not None else None
        if layer is not None:
            group = f"layer_{layer}_{group}"
        if group not in groups:
            scale = 1.0 if layer is None or get_layer_scale is None else get_layer_scale(layer)
            groups[group] = {"name": group, "weight_decay": decay, "params": [], "lr_scale": scale}
        groups[group]["params"].append(parameter)
    return list(groups.values())


def create_optimizer(
    args: argparse.Namespace,
    model: nn.Module,
    get_num_layer: Callable[[str], int] | None = None,
    get_layer_scale: Callable[[int], float] | None = None,
    filter_bias_and_bn: bool = True,
    skip_list: Iterable[str] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer named by args.opt over the model's parameter groups.

    args: opt, lr, weight_decay, opt_eps, opt_betas, momentum.

    AdamW and Adam are torch's fused ones: they can skip a step on the device, without a
    synchronization. (Fused SGD can too, but leaves its momentum uninitialized if the
    first step is skipped.) Any other name is one of timm's.
    """
    if skip_list is None:
        skip_list = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if filter_bias_and_bn:
        groups = get_parameter_groups(model, args.weight_decay, skip_list, get_num_layer, get_layer_scale)
    else:
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups = [{"name": "all", "params": trainable, "lr_scale": 1.0, "weight_decay": args.weight_decay}]
    name = args.opt.lower()
    adam: dict[str, Any] = {"lr": args.lr, "eps": args.opt_eps}
    if args.opt_betas:
        adam["betas"] = tuple(args.opt_betas)
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **adam)
    if name == "adam":
        return torch.optim.Adam(groups, fused=True, **adam)
    if name in ("sgd", "momentum"):
        nesterov = name == "sgd" and args.momentum > 0
        return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, nesterov=nesterov)
    return _timm_optimizer(name, groups, args)


def _timm_optimizer(
    name: str, groups: list[dict[str, Any]], args: argparse.Namespace
) -> torch.optim.Optimizer:
    import timm.optim

    settings: dict[str, Any] = {"betas": tuple(args.opt_betas)} if args.opt_betas else {}
    if args.opt_eps != 1e-8:  # each of timm's optimizers has a default of its own
        settings["eps"] = args.opt_eps
    try:
        return timm.optim.create_optimizer_v2(
            groups,
            opt=name,
            lr=args.lr,
            momentum=getattr(args, "momentum", 0.9),
            weight_decay=0.0,
            filter_bias_and_bn=False,
            **settings,
        )
    except TypeError as error:
        raise UserError(f"`opt` {name} does not take `opt_eps` or `opt_betas` ({error})") from None
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"`opt` {name}: neither adamw, adam, sgd nor one of timm's optimizers ({error})"
        ) from None


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


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay for every optimizer step of the run.

    `in_steps`: the run is counted in optimizer steps, whatever an epoch is; else in
    epochs, whatever a step is.
    """

    lr: np.ndarray
    weight_decay: np.ndarray
    in_steps: bool = False

    def hold(self, steps: int) -> Schedule:
        """Each value for so many steps, instead of one."""
        return Schedule(self.lr.repeat(steps), self.weight_decay.repeat(steps), self.in_steps)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the groups' values for optimizer step `step` of the run."""
        step = min(step, len(self.lr) - 1)
        for group in optimizer.param_groups:
            group["lr"] = float(self.lr[step]) * group["lr_scale"]
            if not group["name"].endswith("no_decay"):
                group["weight_decay"] = float(self.weight_decay[step])


@dataclass(frozen=True)
class ScheduleOptions:
    """A cosine schedule: flags of the same names."""

    epochs: int
    min_lr: float
    warmup_epochs: float
    warmup_steps: int  # above 0: replaces warmup_epochs
    weight_decay: float
    weight_decay_end: float | None  # None: the weight decay is constant


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
    return Schedule(
        cosine_scheduler(
            lr, options.min_lr, *shape, warmup_epochs=options.warmup_epochs, warmup_steps=options.warmup_steps
        ),
        cosine_scheduler(decay, decay_end, *shape),
    )


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
