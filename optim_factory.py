"""Parameter groups, layer-wise learning rates and optimizers. Groups are pure
functions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from errors import UserError
from schedules import cosine_scheduler

__all__ = [
    "LayerDecayValueAssigner",
    "cosine_scheduler",
    "create_optimizer",
    "decayed_layers",
    "get_num_layer_for_vit",
    "get_parameter_groups",
    "layer_decay_values",
]


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


# of get_parameter_groups; None, None: one rate for all layers
LayerRates = tuple[Callable[[str], int] | None, Callable[[int], float] | None]


def decayed_layers(decay: float, depth: int, trunk: str = "") -> LayerRates:
    """`get_num_layer` and `get_layer_scale` of get_parameter_groups for a model with
    `depth` blocks, whose trunk's parameters are called `trunk`...
    """
    layers = LayerDecayValueAssigner(layer_decay_values(decay, depth))
    return lambda name: layers.get_layer_id(name.removeprefix(trunk)), layers.get_scale


def layer_decay_values(decay: float, depth: int) -> list[float]:
    """decay ** (L + 1 - layer) for the layers 0 .. L + 1 of a model with L blocks."""
    return [decay ** (depth + 1 - layer) for layer in range(depth + 2)]


def get_parameter_groups(
    model: nn.Module,
    weight_decay: float = 1e-5,
    skip_list: Iterable[str] = (),
    get_num_layer: Callable[[str], int] | None = None,
    get_layer_scale: Callable[[int], float] | None = None,
    frozen_at_first: Container[str] = (),
) -> list[dict[str, Any]]:
    """Groups `[frozen_][layer_i_]{decay,no_decay}` in the order in which the parameters
    first meet them.

    No weight decay for 1-d parameters, biases and the names in `skip_list`. Each group
    carries `weight_decay` and `lr_scale`; the training loop multiplies the scheduled
    rate by the latter. `frozen_at_first`: the names of parameters that do not learn in
    the schedule's first `freeze_steps`.
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
        if name in frozen_at_first:
            group = f"frozen_{group}"
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
    frozen_at_first: Container[str] = (),
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
        groups = get_parameter_groups(
            model, args.weight_decay, skip_list, get_num_layer, get_layer_scale, frozen_at_first
        )
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
