"""One configuration of a run, measured on tensors without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.parallel import DistributedDataParallel

import arguments
import engine
from data_pipeline.code_cache import CodeCache
from engine_for_pretraining import Tokens
from estimation import tracker as kinds
from estimation.pretending import pretend
from estimation.stand_ins import Entry
from estimation.tracker import Tracker
from flags.pretraining import student_grid
from layers.token_subset import list_masked
from norm_ema_quantizer import NormEMAVectorQuantizer
from runtime.cards import Card

LATE = 10**9  # a step after every warm-up


@dataclass(frozen=True)
class Measured:
    """A step of one of the processes.

    flops: of a step, with what the backward pass computes again. exchanged: bytes that
    a process gives to the others in a step. images: of all processes, in a step.
    checkpoint: bytes of a file. codes: bytes of all that `crop_cycle` keeps on the disk.
    """

    parameters: int
    peak: int
    by_kind: dict[str, int]
    flops: int
    exchanged: int
    images: int
    steps: int
    steps_per_epoch: int
    checkpoint: int
    codes: int


class PretendedRun:
    """A run that the flags describe; `measure` takes steps of it."""

    def __init__(
        self, entry: Entry, args: arguments.Flags, count: int, tracker: Tracker, on_cpu: bool
    ) -> None:
        self.tracker, self.args, self.on_cpu = tracker, args, on_cpu
        self.trainer: engine.Trainer = entry.build(args, count)
        state = self.trainer.state
        self.sample = self.make_sample()
        memory = tracker.memory
        memory.mark(kinds.PARAMETERS, tensors_of(state.model))
        for network in entry.frozen(self.trainer.stage):
            memory.mark(kinds.FROZEN, tensors_of(network))
        if state.ema is not None:
            memory.mark(kinds.AVERAGE, tensors_of(state.ema.module))
        state.runner.train()
        for module in state.model.modules():
            if isinstance(module, NormEMAVectorQuantizer):
                module.ready = True
        self.start_moments()
        if isinstance(state.runner, DistributedDataParallel):
            state.runner.register_comm_hook(None, self.exchange)
            self.step(args.batch_size)  # its first step is unlike the others

    def start_moments(self) -> None:
        """As the first step leaves them, without taking it."""
        state = self.trainer.state
        for parameter in state.parameters:
            parameter.grad = torch.empty_like(parameter)
        state.scaler.scale(torch.zeros(()))  # which starts it
        engine.take_step(state, self.trainer.run.options.clip_grad)
        moments = (value for of_one in state.optimizer.state.values() for value in of_one.values())
        self.tracker.memory.mark(kinds.MOMENTS, moments)

    def make_sample(self) -> dict[str, Tensor]:
        with unset_fake_temporarily():
            return self.trainer.data.loader.dataset.sample()  # type: ignore[attr-defined]

    def exchange(self, state, bucket):  # DDP refuses annotations that are strings
        """DDP's hook: the gradients of a bucket, for all processes."""
        self.tracker.exchanged += bucket.buffer().nbytes
        self.tracker.memory.mark(kinds.GRADIENTS, [bucket.buffer()])
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def batch(self, size: int) -> dict[str, Any]:
        """Copies of the sample, on the host, with what `collate` adds to them."""
        batch = {name: value[None].expand(size, *value.shape) for name, value in self.sample.items()}
        if "mask" in batch:
            batch["masked"] = list_masked(batch["mask"])
        return {"failed": [], **(self.tracker.place(batch) if self.on_cpu else batch)}

    def step(self, batch_size: int) -> None:
        """As Trainer.train_one_step; more than two micro-batches are as two."""
        trainer, memory = self.trainer, self.tracker.memory
        state, run, stage = trainer.state, trainer.run, trainer.stage
        stage.before_step(LATE)
        micro_batches = [self.batch(batch_size) for _ in range(self.micro_batches)]
        transform = trainer.data.loader.dataset.device_transform
        engine.accumulate_gradients(state, stage, micro_batches, run, transform)
        memory.mark(kinds.GRADIENTS, (parameter.grad for parameter in state.model.parameters()))
        engine.take_step(state, run.options.clip_grad)
        if state.ema is not None:
            state.ema.update(state.model, LATE)

    @property
    def micro_batches(self) -> int:
        return min(self.args.update_freq, 2)

    def measure(self, batch_size: int | None = None) -> Measured:
        """A step in the middle of the run; of another batch size, if one is given."""
        batch_size = batch_size or self.args.batch_size
        trainer, tracker = self.trainer, self.tracker
        since = len(tracker.memory.events)
        tracker.start_step()
        self.step(batch_size)
        peak, by_kind = tracker.memory.peak(since)
        data, model = trainer.data, trainer.state.model
        images = data.sampler.world_size * batch_size * self.args.update_freq
        return Measured(
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            peak=peak,
            by_kind=by_kind,
            flops=tracker.flops * self.args.update_freq // self.micro_batches,
            exchanged=tracker.exchanged,
            images=images,
            steps=len(trainer.schedule.lr),
            steps_per_epoch=data.steps_per_epoch,
            checkpoint=self.checkpoint_bytes(),
            codes=self.code_bytes(),
        )

    def code_bytes(self) -> int:
        args, target = self.args, getattr(self.trainer.stage, "target", None)
        if not isinstance(target, Tokens) or not args.crop_cycle:
            return 0
        images = len(self.trainer.data.loader.dataset)
        return CodeCache("", args.crop_cycle, images, student_grid(args) ** 2, target.width).size

    def checkpoint_bytes(self) -> int:
        """Weights, moments and moving average, whole."""
        state = self.trainer.state
        saved = [*tensors_of(state.model)]
        saved += [value for moments in state.optimizer.state.values() for value in moments.values()]
        saved += [] if state.ema is None else tensors_of(state.ema.module)
        return sum(value.numel() * value.itemsize for value in saved if isinstance(value, Tensor))


def tensors_of(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


@contextmanager
def pretended_run(
    entry: Entry, args: arguments.Flags, count: int, card: Card | None, gpus: int
) -> Iterator[PretendedRun]:
    with pretend(card, gpus) as tracker:
        yield PretendedRun(entry, args, count, tracker, on_cpu=card is None)
