"""Two gloo processes through run_state.new_state: parameters without a gradient,
accumulation, recomputation, compilation.
"""

import pytest
import torch
from many_processes import run_ranks
from tiny_runs import MeanSquare
from torch import nn

import engine
import modeling_finetune
import run_state
from runtime import compilation
from runtime.device import Precision
from runtime.distributed import Launch
from vit_backbone import recompute_blocks


class WithAnIdleParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(4, 1)
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.used(x)


def three_steps(rank, world_size, build, update_freq, recompute, compiled):
    options = run_state.RunOptions(grad_checkpointing=recompute, update_freq=update_freq)
    place = Launch(rank, world_size), torch.device("cpu"), Precision("cpu", None)
    run = run_state.Run(options, *place)
    torch.manual_seed(0)
    model, shape = build()
    state = run_state.new_state(model, torch.optim.SGD(model.parameters(), lr=0.1), run, "x")
    if compiled:
        compilation.BACKEND = "aot_eager"
        assert compilation.compile_networks(2, model)
    model.train()
    for step in range(3):
        batches = [{"image": inputs(shape, step, micro, rank)} for micro in range(update_freq)]
        engine.accumulate_gradients(
            state, MeanSquare(run.device, run.precision), batches, run, device_transform=dict
        )
        engine.take_step(state, None)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def inputs(shape, step, micro, rank):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))


def idle():
    return WithAnIdleParameter(), (4,)


def vit():
    sizes = {
        "img_size": 32,
        "patch_size": 16,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "num_classes": 4,
        "init_values": 0.1,
    }
    return modeling_finetune.VisionTransformer(**sizes, init_scale=1.0), (3, 32, 32)


def alone(build, update_freq):
    """The same three steps over both ranks' images."""
    torch.manual_seed(0)
    model, shape = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(update_freq):
            images = torch.cat([inputs(shape, step, micro, rank) for rank in range(2)])
            (model.train()(images).square().mean() / update_freq).backward()
        optimizer.step()
    return dict(model.named_parameters())


# what is built, update_freq, recomputed, compiled
CASES = [
    (idle, 1, False, False),
    (vit, 1, True, False),
    (vit, 2, True, False),
    (vit, 1, False, True),
    (vit, 1, True, True),
]


def every_case(rank, world_size):
    return [three_steps(rank, world_size, *case) for case in CASES]


@pytest.mark.slow
def test_two_processes_step_as_one():
    for case, first, second in zip(CASES, *run_ranks(every_case, 2), strict=True):
        for name, expected in alone(*case[:2]).items():
            assert torch.equal(first[name], second[name]), (case, name)
            assert torch.allclose(first[name], expected, atol=1e-6), (case, name)


def test_recompute_blocks_reaches_blocks_alone():
    model, _ = vit()
    recompute_blocks(model)
    assert [module.recompute for module in model.modules() if hasattr(module, "recompute")] == [True] * 3
