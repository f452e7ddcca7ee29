"""Training steps for benchmark.py: the training loop's own on a stage of ours, and one as everybody writes it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import engine
from benchmarks.timing import Local, Mark, bytes_of
from engine_for_pretraining import Tokens
from optim_factory import create_optimizer, get_parameter_groups
from run_state import Run, Stage, TrainState

ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-8}
WEIGHT_DECAY = 0.05
CLIP_GRAD = 3.0


class Ours(Stage):
    """The training loop's own step on a stage of ours, which says where its phases end."""

    def __init__(self, stage: Stage, model: nn.Module, run: Run) -> None:
        self.stage, self.run = stage, run
        self.mark: Mark = lambda phase: None
        flags = argparse.Namespace(
            opt="adamw", lr=ADAMW["lr"], opt_betas=ADAMW["betas"], opt_eps=ADAMW["eps"], weight_decay=0.05
        )
        runner = torch.compile(model) if run.args.compile else model
        scaler = torch.amp.GradScaler(run.device.type, enabled=False)
        self.state = TrainState(model, runner, create_optimizer(flags, model), scaler)  # type: ignore[arg-type]
        model.train()

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        result = self.stage.step(model, batch)
        self.mark("forward")
        return result

    def gradients(self, batch: dict[str, Any]) -> Tensor:
        return engine.accumulate_gradients(self.state, self, [batch], self.run, finish=dict)["loss"]

    def __call__(self, batch: dict[str, Any], mark: Mark) -> Tensor:
        self.mark = mark
        loss = self.gradients(batch)
        mark("backward")
        engine.take_step(self.state, CLIP_GRAD)
        mark("optimizer")
        return loss

    def flops(self, batch: dict[str, Any]) -> int:
        """Of all matrix products and convolutions in forward, backward and the frozen
        networks; the step is not taken.
        """
        eager, self.state.runner = self.state.runner, self.state.model
        # fused attention would not be counted
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.gradients(batch)
        self.state.runner = eager
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
    """A training step as everybody writes it, with AdamW in torch's default form or, as ours, fused.

    `beside`: a frozen network, for the count of memory.
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
    @torch.no_grad()
    def work(batch: dict[str, Any], mark: Mark) -> Tensor:
        model.eval()
        with run.precision.autocast():
            loss = F.cross_entropy(model(batch["image"]).float(), batch["label"])
        mark("forward")
        return loss

    return Local(name, work, run.device, lambda: bytes_of(model))


def randomize_zeros(model: nn.Module) -> None:
    """Random values where initialization leaves (nearly) zeros: biases, tables, the
    classifier. A mistake in what they do must show in the loss; of a table of small
    values (0.02) the softmax takes hardly any notice.
    """
    for name, parameter in model.named_parameters():
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=1.0 if name.endswith("relative_position_bias_table") else 0.02)


class MarkedTokens(Tokens):
    """Codes of a frozen tokenizer; says when they are there."""

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
