"""`compile`: torch.compile for the parts of the networks that take the time, in place,
so that checkpoints keep their names.

A class says which of its methods are worth compiling (`compiled_methods`). They are
whole graphs: what depends on the data (which patches are masked) is found before, on
the host. Each is compiled once, for training: what is called otherwise, with the rest
of an evaluation's images or for pictures, runs as it is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from errors import UserError

BACKEND = "inductor"


def compile_networks(batch_size: int, *networks: nn.Module) -> int:
    """Compile what the networks' classes name; returns the number of methods.
    `batch_size`: images of a micro-batch.
    """
    modules = [module for network in networks for module in network.modules()]
    methods = [(module, name) for module in modules for name in getattr(module, "compiled_methods", ())]
    recomputed = any(getattr(module, "recompute", False) for module in modules)
    # DDP's cutting of the graph at its buckets, which lets gradients travel early,
    # cannot cut within recomputed blocks.
    torch._dynamo.config.optimize_ddp = not recomputed  # type: ignore[attr-defined]
    for module, name in methods:
        setattr(module, name, in_training(module, getattr(module, name), batch_size))
    return len(methods)


def in_training(module: nn.Module, plain: Callable[..., Any], batch_size: int) -> Callable[..., Any]:
    """`plain`, compiled for calls in training. A frozen network is always in eval mode:
    then the batch must be a whole one.
    """
    compiled = torch.compile(plain, dynamic=False, backend=BACKEND)
    frozen = not any(parameter.requires_grad for parameter in module.parameters())

    def chosen(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = len(x) == batch_size if frozen else module.training
        return (compiled if whole else plain)(x, *args, **kwargs)

    return chosen


def require_compiler(device: torch.device) -> None:
    """What torch.compile needs beside torch; asked before the first step would fail."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "`compile` on a CPU needs a C++ compiler, and there is no g++ here: install one (apt install "
            "g++), name another in the variable CXX, or leave `compile` out"
        )
    if device.type == "cuda" and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        raise UserError(
            "`compile` needs a C compiler, and there is no gcc here: install one, or leave `compile` out"
        )
