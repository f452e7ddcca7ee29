"""How weights begin (BEiT, section 2.5 and appendix)."""

from __future__ import annotations

import math

from torch import Tensor, nn


def truncated_normal_(tensor: Tensor, std: float, cut: float) -> None:
    """Normal(0, std) redrawn beyond +-cut (an absolute bound, not a multiple of
    std).
    """
    nn.init.trunc_normal_(tensor, std=std, a=-cut, b=cut)


def init_linear_and_norm(module: nn.Module, std: float, cut: float) -> None:
    """Weights of linear layers truncated normal, biases zero, norms 1 and 0. For
    nn.Module.apply.
    """
    if isinstance(module, nn.Linear):
        truncated_normal_(module.weight, std, cut)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def rescale_outputs(blocks: nn.ModuleList, first: int = 1) -> None:
    """Divide what block l adds to the residual stream by sqrt(2 l) (BEiT, section 2.5:
    stable large-scale training).
    """
    for layer, block in enumerate(blocks, start=first):
        block.attn.proj.weight.data.div_(math.sqrt(2.0 * layer))
        block.mlp.fc2.weight.data.div_(math.sqrt(2.0 * layer))
