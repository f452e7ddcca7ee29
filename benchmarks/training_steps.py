"""Training steps for benchmark.py: that of our training loop, and one as textbooks
write it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import engine
from benchmarks.timing import Local, Mark, bytes_of
from engine import Stage
from engine_for_pretraining import Tokens
from optim_factory import get_parameter_groups
from run_state import Run, new_state
from runtime import compilation

ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-8}
WEIGHT_DECAY = 0.05
CLIP_GRAD = 3.0


@dataclass(frozen=True)
class Workload:
    """What the steps of a contest compute on.

    model: row of vit_backbone.SIZES. teacher: of VQ-KD. seed: of weights, images and
    masks. compile: torch.compile for ours alone.
    """

    model: str
    batch_size: int
    teacher: str = "hog"
    seed: int = 0
    compile: bool = False


class Ours(Stage):
    """The step of our training loop on one of our stages, set up as a run sets it up;
    marks the ends of its phases.
    """

    def __init__(self, stage: Stage, model: Any, run: Run) -> None:
        super().__init__(run.device, run.precision)
        self.stage, self.run = stage, run
        self.mark: Mark = lambda phase: None
        groups = get_parameter_groups(model, WEIGHT_DECAY, model.no_weight_decay())
        optimizer = torch.optim.AdamW(groups, fused=True, **ADAMW)
        self.state = new_state(model, optimizer, run, type(model).__name__)
        model.train()

    def compile(self, workload: Workload, *frozen: nn.Module) -> None:
        """As `compile` does it in a run, if the workload asks for it: after counting."""
        if workload.compile:
            compilation.compile_networks(workload.batch_size, self.state.model, *frozen)

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        result = self.stage.step(model, batch)
        self.mark("forward")
        return result

    def gradients(self, batch: dict[str, Any]) -> Tensor:
        return engine.accumulate_gradients(self.state, self, [batch], self.run, device_transform=dict)["loss"]

    def __call__(self, batch: dict[str, Any], mark: Mark) -> Tensor:
        self.mark = mark
        loss = self.gradients(batch)
        mark("backward")
        engine.take_step(self.state, CLIP_GRAD)
        mark("optimizer")
        return loss

    def flops(self, batch: dict[str, Any]) -> int:
        """Of all matrix products and convolutions in forward, backward and the frozen
        networks.

        The optimizer does not step.
        """
        # the counter does not know fused attention
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.gradients(batch)
        self.state.optimizer.zero_grad()
        return counter.get_total_flops()


def textbook(
    model: nn.Module,
    run: Run,
    loss_of: Callable[[dict[str, Any], Mark], Tensor],
    name: str = "plain",
    fused: bool = False,
    beside: nn.Module | None = None,
) -> Local:
    """A training step as textbooks write it, with AdamW in torch's default form or
    fused, as ours.

    `beside`: a frozen network whose memory counts too.
    """
    model.train()
    optimizer = torch.optim.AdamW(get_parameter_groups(model, WEIGHT_DECAY), fused=fused or None, **ADAMW)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def work(batch: dict[str, Any], mark: Mark) -> Tensor:
        with run.precision.autocast():
            loss = loss_of(batch, mark)
        mark("forward")
        loss.backward()
        mark("backward")
        nn.utils.clip_grad_norm_(parameters, CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad()
        mark("optimizer")
        return loss.detach()

    frozen = [] if beside is None else [beside]
    return Local(name, work, run.device, lambda: bytes_of(model, *frozen, optimizer=optimizer))


def inference(name: str, model: nn.Module, run: Run) -> Local:
    """The loss of a classifier in eval mode, without gradients."""

    @torch.no_grad()
    def work(batch: dict[str, Any], mark: Mark) -> Tensor:
        model.eval()
        with run.precision.autocast():
            loss = F.cross_entropy(model(batch["image"]).float(), batch["label"])
        mark("forward")
        return loss

    return Local(name, work, run.device, lambda: bytes_of(model))


def randomize_zeros(model: nn.Module) -> None:
    """Give random values to what initialization leaves at (nearly) zero: biases,
    tables, the classifier.

    A mistake in how they are used must show in the loss. Bias tables get larger values,
    because small ones (0.02) hardly change a softmax.
    """
    for name, parameter in model.named_parameters():
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=1.0 if name.endswith("relative_position_bias_table") else 0.02)


class MarkedTokens(Tokens):
    """Codes of a frozen tokenizer, as the target; marks the time when they are
    computed.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ours: Ours | None = None

    def encode(self, batch: dict[str, Any], masked_only: bool = False) -> Tensor:
        codes = super().encode(batch, masked_only)
        if self.ours is not None:
            self.ours.mark("tokenizer")
        return codes


def classification_loss(model: nn.Module) -> Callable[[dict[str, Any], Mark], Tensor]:
    return lambda batch, mark: F.cross_entropy(model(batch["image"]).float(), batch["label"])
