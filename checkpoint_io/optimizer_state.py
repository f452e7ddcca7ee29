"""Whether a saved optimizer's state fits the parameters that it is for."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch

from errors import UserError

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

    `saved`: an optimizer's `state_dict()`, of whole tensors. `names`: id of a parameter
    -> its name. UserError that begins with `source`: other groups, or a tensor of
    another shape or kind than its parameter needs, or that is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise UserError(
            f"{source}: its optimizer is not the state of one; start from its weights with `finetune`"
        )
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        raise UserError(
            f"{source}: its optimizer has no groups of parameters; start from its weights with `finetune`"
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
            f"{source}: its optimizer has {what}: give the flags it was trained with (`layer_decay`, `model`)"
        )
    numbers = [number for group in groups for number in group["params"]]
    if numbers != list(range(len(parameters))) or not saved["state"].keys() <= set(numbers):
        raise UserError(
            f"{source}: its optimizer numbers its parameters in no order of ours; take another checkpoint"
        )
    if not saved["state"]:
        return
    trial = None if type(optimizer) in MOMENTS else simulate_step(optimizer)
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
                else find_fault(key, value, shapes.get(key), parameter)
            )
            if wrong:
                raise UserError(f"{source}: the optimizer's {key} of {name} {wrong}; take another checkpoint")


def find_fault(key: str, value: Any, shape: torch.Size | None, parameter: torch.Tensor) -> str:
    """What is wrong with a saved moment; "" if it is as it should be. `shape`: None for
    what the optimizer has no use for.
    """
    if key == "step" and not isinstance(value, torch.Tensor):
        fine = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
        return "" if fine else "is not a count of steps"
    if not isinstance(value, torch.Tensor):
        return "is not a tensor" if shape is not None else ""
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        return "is not a plain tensor"
    if key == "step":
        fine = (
            value.numel() == 1
            and not value.is_complex()
            and bool(torch.isfinite(value.float()))
            and float(value) >= 0
        )
        return "" if fine else "is not a count of steps"
    if shape is not None and value.shape != shape:
        return f"has the shape {list(value.shape)}, where {list(shape)} is needed"
    if shape is not None and parameter.is_floating_point() != value.is_floating_point():
        return f"is of {value.dtype}, where numbers like its parameter's, {parameter.dtype}, are needed"
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        return "holds numbers that are not finite"
    return "is below zero" if key == "exp_avg_sq" and value.numel() and float(value.min()) < 0 else ""


def simulate_step(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer keeps of each parameter, found by a step of a copy: the moments
    of some of timm's have shapes of their own.
    """
    trial = copy.deepcopy(optimizer)
    parameters = [p for group in trial.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    trial.step()
    return [dict(trial.state[parameter]) for parameter in parameters]
