"""`fsdp`: each process holds its share of the weights, gradients and moments (torch's
  FSDP2), a slice of every tensor's rows.

While a block computes, its weights are gathered, and dropped after it. Everything
around the step sees whole tensors: a checkpoint does not tell how many processes wrote
it, and evaluation and pictures run on a whole copy of the model, so that a process may
work there alone, by whichever method, without the others waiting for it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from errors import UserError

# torch.distributed's parts are imported where they are used: they take half a second,
# and not every torch has them.

OPTIMIZERS = ("adamw", "adam", "sgd", "momentum")  # number by number; others need norms of whole tensors

# Sharded model -> the same without weights (on the meta device), for `gather_model` to
# fill: sharded modules cannot be copied.
WITHOUT_WEIGHTS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def check_options(opt: str, compile: bool, model_ema_force_cpu: bool, device: torch.device) -> None:
    """Refuse, before any work, what cannot go with `fsdp` under several processes."""
    from torch.distributed.fsdp import FSDPModule

    if compile:
        raise UserError(
            "`fsdp` and `compile` do not go together (weights come and go between the compiled parts): "
            "leave one of them out"
        )
    if opt.lower() not in OPTIMIZERS:
        raise UserError(
            f"`fsdp` works with `opt` {', '.join(OPTIMIZERS)}, not with {opt}, which needs whole tensors"
        )
    if model_ema_force_cpu:
        raise UserError(
            "`model_ema_force_cpu` has no effect with `fsdp`, which shards the moving average too: leave "
            "it out"
        )
    if device.type == "cpu" and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UserError(
            f"`fsdp` on CPUs needs a newer torch than {torch.__version__}, whose gloo cannot average "
            "gradients; leave it out"
        )


def shard(
    model: nn.Module, device: torch.device, unit: type[nn.Module], dtype: torch.dtype | None = None
) -> None:
    """Leave of `model`, in place, this process's share on `device`; the weights must be
    the same everywhere before.

    `unit`: modules of this class are gathered one at a time, the rest of the model
    together. `dtype`: of autocast, None for fp32; the units' matrices travel in it. The
    model may be in main memory: it moves to the device unit by unit, and is never whole
    there. Optimizers come after.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    without_weights: Any = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    WITHOUT_WEIGHTS[model] = copy.deepcopy(model, without_weights)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in [*(module for module in model.modules() if isinstance(module, unit)), model]:
        casts = {} if module is model else cast_gathered(module, dtype)
        sharded: Any = fully_shard(module, mesh=mesh, **casts)
        # gloo took the sum for the mean, silently (pytorch issue 162338): sum, then
        # divide
        if device.type == "cpu":
            sharded.set_force_sum_reduction_for_comms(True)
    # Autocast would keep its low-precision copy of every block's weights to the end of
    # the forward pass.
    torch.set_autocast_cache_enabled(False)


def cast_gathered(unit: nn.Module, dtype: torch.dtype | None) -> dict[str, Any]:
    """Arguments of `fully_shard` for a unit that runs under autocast of `dtype`: the
    weights of its linear layers are gathered in it, half the bytes.

    Autocast would cast the same weights after the gathering: nothing differs, bit for
    bit. The others (norms, layer scale, bias tables) stay in fp32, as under autocast,
    and so does the sum of the gradients. Without torch 2.15 one type holds for all:
    nothing is cast.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if dtype is None or not hasattr(MixedPrecisionPolicy, "param_dtype_override_fn"):
        return {}
    cast = {id(layer.weight) for layer in unit.modules() if type(layer) is nn.Linear}
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda parameter: dtype if id(parameter) in cast else parameter.dtype,
    )
    return {"mp_policy": policy}


def is_sharded(model: nn.Module) -> bool:
    return model in WITHOUT_WEIGHTS


@contextlib.contextmanager
def gather_model(model: nn.Module) -> Iterator[nn.Module]:
    """To look at the model: itself, or (sharded) a whole plain copy that lasts as long
    as the context.

    All processes must enter; inside, none needs the others.
    """
    if not is_sharded(model):
        yield model
        return
    plain = WITHOUT_WEIGHTS[model]
    with torch.no_grad():
        plain.load_state_dict(
            {name: gather_full(value) for name, value in model.state_dict().items()}, assign=True
        )
    try:
        yield plain
    finally:
        plain.to("meta")


def is_shard(value: Any) -> bool:
    """A DTensor, without importing it."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def gather_full(tensor: Any) -> Tensor:
    """A shard -> the whole tensor, on every process; all must ask together. Any other
    tensor -> itself.
    """
    return tensor.full_tensor() if is_shard(tensor) else tensor


def shard_of(value: Any, like: Any) -> Any:
    """A whole tensor -> this process's shard of it, laid out as `like`; without
    communication.

    The value itself where `like` is not a shard, or not of the value's shape.
    """
    if not is_shard(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, Shard

    assert like.placements == (Shard(0),)
    rows = own_rows(len(value), like.device_mesh.size(), like.device_mesh.get_local_rank())
    own = value[rows].to(like.device, copy=True).contiguous()
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def own_rows(rows: int, processes: int, rank: int) -> slice:
    """Which rows a process holds: equally many each, except for the last ones, which
    may have fewer, or none.
    """
    each = -(-rows // processes)
    return slice(rank * each, (rank + 1) * each)


def shard_weights(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A whole state dict as `model.load_state_dict` takes it."""
    own = model.state_dict()
    return {name: shard_of(value, own.get(name)) for name, value in weights.items()}


def shard_moments(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole optimizer's state dict as `optimizer.load_state_dict` takes it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {name: shard_of(value, parameters[index]) for name, value in moments.items()}
        for index, moments in saved["state"].items()
    }
    return saved | {"state": state}
