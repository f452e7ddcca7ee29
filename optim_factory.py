"""Parameter groups, layer-wise learning rates, optimizers and schedules. Groups and
schedules are pure functions.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """Learning-rate factor per layer; `values` runs from the embeddings (0) to the head (last)."""

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
    """Groups `[layer_i_]{decay,no_decay}` in the order in which the parameters first meet them.

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
        raise UserError(f"--opt {name} does not take --opt_eps or --opt_betas ({error})") from None
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"--opt {name}: neither adamw, adam, sgd nor one of timm's optimizers ({error})"
        ) from None


# torch's own optimizers -> what they keep of a parameter, in its shape, and whether
# they cannot do without
MOMENTS = {
    torch.optim.Adam: (("exp_avg", "exp_avg_sq"), True),
    torch.optim.AdamW: (("exp_avg", "exp_avg_sq"), True),
    torch.optim.SGD: (("momentum_buffer",), False),
}


def check_saved_state(
    saved: Any, optimizer: torch.optim.Optimizer, names: Mapping[int, str], source: str
) -> None:
    """Compare a saved optimizer, tensor by tensor, with the parameters it is for: fused
    kernels read and write moments without looking at their shapes.

    saved: an optimizer's `state_dict()`, of whole tensors. names: id of a parameter ->
    its name. UserError that begins with `source`: other groups, or a tensor of another
    shape or kind than its parameter needs, or that is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise UserError(
            f"{source}: its optimizer is no optimizer's state; start from its weights with --finetune"
        )
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        raise UserError(
            f"{source}: its optimizer has no groups of parameters; start from its weights with --finetune"
        )
    found = [len(group["params"]) for group in groups]
    if found != sizes:
        where = next((i for i, (a, b) in enumerate(zip(found, sizes, strict=False)) if a != b), None)
        what = (
            f"{len(found)} groups of parameters, this run's has {len(sizes)}"
            if where is None
            else f"{found[where]} parameters in group {where}, this run's has {sizes[where]}"
        )
        raise UserError(
            f"{source}: its optimizer has {what}: give the flags it was trained with (--layer_decay, --model)"
        )
    numbers = [number for group in groups for number in group["params"]]
    if numbers != list(range(len(parameters))) or not saved["state"].keys() <= set(numbers):
        raise UserError(
            f"{source}: its optimizer numbers its parameters in no order of ours; take another checkpoint"
        )
    if not saved["state"]:
        return
    trial = None if type(optimizer) in MOMENTS else state_after_a_step(optimizer)
    for number, moments in saved["state"].items():
        name, parameter = names.get(id(parameters[number]), f"parameter {number}"), parameters[number]
        if not isinstance(moments, dict):
            raise UserError(f"{source}: the optimizer's state of {name} is damaged; take another checkpoint")
        if trial is None:
            kept, needed = MOMENTS[type(optimizer)]
            shapes: dict[str, Any] = dict.fromkeys(kept, parameter.shape)
            missing = [key for key in ("step", *kept) if key not in moments] if needed else []
        else:
            shapes = {
                key: value.shape for key, value in trial[number].items() if isinstance(value, torch.Tensor)
            }
            missing = [key for key in trial[number] if key not in moments]
        if missing:
            raise UserError(
                f"{source}: the optimizer's {missing[0]} of {name} is missing; take another checkpoint"
            )
        for key, value in moments.items():
            wrong = (
                ""
                if key == "momentum_buffer" and value is None
                else fault_of(key, value, shapes.get(key), parameter)
            )
            if wrong:
                raise UserError(f"{source}: the optimizer's {key} of {name} {wrong}; take another checkpoint")


def fault_of(key: str, value: Any, shape: torch.Size | None, parameter: torch.Tensor) -> str:
    """What is wrong with a saved moment; "" if it is as it should be. `shape`: None for
    what the optimizer has no use for.
    """
    if key == "step" and not isinstance(value, torch.Tensor):
        fine = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
        return "" if fine else "is no count of steps"
    if not isinstance(value, torch.Tensor):
        return "is no tensor" if shape is not None else ""
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        return "is no plain tensor"
    if key == "step":
        fine = (
            value.numel() == 1
            and not value.is_complex()
            and bool(torch.isfinite(value.float()))
            and float(value) >= 0
        )
        return "" if fine else "is no count of steps"
    if shape is not None and value.shape != shape:
        return f"has the shape {list(value.shape)}, where {list(shape)} is needed"
    if shape is not None and parameter.is_floating_point() != value.is_floating_point():
        return f"is of {value.dtype}, where numbers like its parameter's, {parameter.dtype}, are needed"
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        return "holds numbers that are not finite"
    return "is below zero" if key == "exp_avg_sq" and value.numel() and float(value.min()) < 0 else ""


def state_after_a_step(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer keeps of each parameter, found by a step of a copy; timm's have
    factors of shapes of their own.
    """
    trial = copy.deepcopy(optimizer)
    parameters = [p for group in trial.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    trial.step()
    return [dict(trial.state[parameter]) for parameter in parameters]


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: float = 0,
    start_warmup_value: float = 0,
    warmup_steps: int = -1,
) -> np.ndarray:
    """One value per optimizer step: linear warm-up that includes its endpoint, then half a
    cosine to `final_value`.

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
            f"warning: the warm-up ({warmup} steps) is as long as the run ({steps} steps): "
            "the learning rate only rises; lower `warmup_epochs`"
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
            f"`warmup_steps` {warmup_steps} is as long as the run of `max_steps` {max_steps}: "
            "shorten it, or give 0"
        )
    return Schedule(
        poly_scheduler(lr, min_lr, max_steps, warmup_steps, poly_power),
        np.full(max_steps, weight_decay),
        in_steps=True,
    )
