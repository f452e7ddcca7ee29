"""What a step computes, and what the device could compute in that time: their ratio is
the MFU (model FLOPs utilization; Chowdhery et al. 2022, PaLM, appendix B).

Counted are matrix products, convolutions and attention; a product and a sum are two.
What a backward pass computes again to save memory does not count.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from runtime.cards import has_peak_of_its_row, recognize
from runtime.device import Precision
from runtime.terminal import log

aten: Any = torch.ops.aten
STEPS_TO_COUNT = 2  # a first one may do more than the others (k-means of a codebook)
# The backward pass of attention computes the scores again: one of five products.
OF_ATTENTION_BACKWARD = 4 / 5
MEASURED_SIDE, MEASURED_SECONDS = 512, 0.1  # of the matrices by which a CPU is measured
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}  # as `amp_dtype` says them


class FlopCounter(TorchDispatchMode):
    """Counts what is computed in its context, and changes none of it.

    with_backward: of a forward pass alone, add what its backward pass will compute.
    """

    def __init__(self, with_backward: bool = False) -> None:
        super().__init__()
        self.with_backward, self.flops = with_backward, 0
        self.is_sure = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(getattr(func, "_overloadpacket", None))
        if count is not None and not is_recomputing():
            try:
                flops = count(*args, **kwargs, out_val=out)
            except Exception:  # of torch's formula for the operation: the MFU is not known, that is all
                flops, self.is_sure = 0, False
            name = func._overloadpacket.__name__
            if "attention" in name and name.endswith("backward"):
                flops *= OF_ATTENTION_BACKWARD
            if self.with_backward and torch.is_grad_enabled():
                flops *= 1 + count_backward_products(name, args)
            self.flops += int(flops)
        return out


def is_recomputing() -> bool:
    """In a backward pass, whose own products need no graph: a forward pass again."""
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()


def count_backward_products(name: str, args: Any) -> int:
    """How many times the work of a forward operation its backward pass takes: once for
    each factor that needs a gradient; attention has two products, and four.
    """
    factors = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
    learning = [factor for factor in factors if isinstance(factor, Tensor) and factor.requires_grad]
    return 2 * bool(learning) if "attention" in name else len(learning)


class StepFlops:
    """What a step of a run computes in this process: `per_step`, None until one was
    counted.

    counts: whether this process counts at all.
    """

    def __init__(self, counts: bool) -> None:
        self.per_step: int | None = None
        self.left = STEPS_TO_COUNT if counts else 0

    @contextlib.contextmanager
    def observe(self) -> Iterator[None]:
        """A step as it is taken: an observer adds nothing to it."""
        if self.left == 0:
            yield
            return
        with FlopCounter() as counter:
            yield
        self.per_step = counter.flops if counter.is_sure else None
        self.left -= 1

    def rehearse(self, model: nn.Module, forward: Callable[[], None], times: int) -> None:
        """Of a compiled network, which an observer would keep from being compiled: one
        forward pass as it is written, in eval mode and without what a backward pass
        needs. `times`: micro-batches of a step.
        """
        if self.left == 0:
            return
        training = {module: module.training for module in model.modules()}
        model.eval()
        nothing = torch.zeros(())
        nothing_kept = torch.autograd.graph.saved_tensors_hooks(lambda _: nothing, lambda kept: kept)
        try:
            with torch.compiler.set_stance("force_eager"), nothing_kept, FlopCounter(True) as counter:
                forward()
        finally:
            for module, mode in training.items():
                module.training = mode
        self.per_step, self.left = counter.flops * times if counter.is_sure else None, 0


# ── The peak ──


def find_peak(device: torch.device, precision: Precision, stated: float | None) -> float | None:
    """FLOP/s of one device: `peak_tflops`, else the data sheet's of a known GPU, else
    measured on a CPU; None of another GPU. Says which, once.
    """
    dtype = DTYPES[precision.dtype]
    if stated is not None:
        peak, source = 1e12 * stated, "stated"
    elif device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card = recognize(properties.name, properties.total_memory)
        if card is None or not has_peak_of_its_row(properties.name):
            log.info(f"peak       of {properties.name} not known: for the MFU give `peak_tflops`, in {dtype}")
            return None
        peak, source = card.peak_flops(dtype), f"of {card.name}'s data sheet"
    else:
        peak, source = measure_peak(precision.dtype or torch.float32), "measured by a product of matrices"
    log.info(f"peak       {peak / 1e12:.3g} TFLOP/s in {dtype}, {source}: the MFU is the share of it")
    return peak


@functools.cache
def measure_peak(dtype: torch.dtype) -> float:
    """FLOP/s of this process's threads: the fastest of a tenth of a second's products."""
    matrix = torch.full((MEASURED_SIDE, MEASURED_SIDE), 0.5, dtype=dtype)
    best, started = float("inf"), time.perf_counter()
    with torch.no_grad():
        while (before := time.perf_counter()) - started < MEASURED_SECONDS:
            torch.mm(matrix, matrix)
            best = min(best, time.perf_counter() - before)
    return 2 * MEASURED_SIDE**3 / best
