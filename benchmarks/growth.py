"""How time and memory of our steps grow with images, tokens, codes and ranks, beside what
their formulas say. The sizes take turns, so that a drifting machine bends no curve.

Time is compared with the operations that are counted at each size. Memory, beside what
is kept between steps, with what training has to hold: all of it grows with the images
and, in the quantizer, with the codes; and with T tokens of width C and H heads, a block
keeps 19 C + H T numbers for each: inputs of products, norms, GELU and layer scale, and
the weights of attention. While one block goes backward, there are 2 H T more: the
gradients before and after softmax.
"""

from __future__ import annotations

import copy
import functools
import math
import socket
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import modeling_finetune
from benchmarks.contention import STEPS, StepProcess, list_cores
from benchmarks.contests import pretraining, quantization, variant, vqkd
from benchmarks.input_images import CLASSES, random_batch
from benchmarks.timing import Contender, Contest, Local, Row, Turn, bytes_of
from benchmarks.training_steps import Ours, Workload
from engine_for_finetuning import FinetuningStage
from norm_ema_quantizer import NormEMAVectorQuantizer
from run_state import Run
from vit_backbone import SIZES

TIMES = (1, 2, 4, 8)  # the images of a step
SIDES = (224, 384, 512)  # pixels of an image
CODES = (1024, 4096, 16384, 65536)
RANKS = (1, 2)
GOAL = 1.8  # images/s of two ranks on a core each, divided by those of one
# by which an exponent may be above that of its formula: twice the size may take 2 / GOAL
# times what the formula says
TOLERANCE = math.log2(2 / GOAL)


@dataclass(frozen=True)
class Exponents:
    """p of y = c * size ** p: the slope of log y over log size by least squares, and
    between the last two sizes.
    """

    fitted: float
    last: float

    @classmethod
    def of(cls, sizes: Sequence[float], values: Sequence[float]) -> Exponents:
        x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
        return cls(statistics.linear_regression(x, y).slope, (y[-1] - y[-2]) / (x[-1] - x[-2]))


@dataclass(frozen=True)
class Growth:
    """Of time or memory: medians of the rounds, and the range of the fitted ones."""

    of: str
    measured: Exponents
    lowest: float
    highest: float
    formula: Exponents
    faster: bool  # than the formula

    @classmethod
    def judge(
        cls, of: str, sizes: Sequence[float], rounds: Sequence[Sequence[float]], formula: Sequence[float]
    ) -> Growth:
        """`rounds`: in each, the values at all sizes."""
        found, expected = [Exponents.of(sizes, values) for values in rounds], Exponents.of(sizes, formula)
        fitted = [exponents.fitted for exponents in found]
        measured = Exponents(
            statistics.median(fitted), statistics.median(exponents.last for exponents in found)
        )
        above = max(measured.fitted - expected.fitted, measured.last - expected.last)
        return cls(of, measured, min(fitted), max(fitted), expected, above > TOLERANCE)


class OfSize(Contender):
    """A contender with a batch of its own, which holds that many images."""

    def __init__(self, name: str, contender: Local, batch: dict[str, Any], images: int, flops: int) -> None:
        self.name, self.contender, self.batch = name, contender, batch
        self.images, self.flops = images, flops

    def turn(self, batch: dict[str, Any]) -> Turn:
        turn = self.contender.turn(self.batch)
        return turn if self.contender.device.type == "cpu" else turn._replace(cpu_ms=0.0)

    def peak(self, batch: dict[str, Any]) -> int:
        return self.contender.peak(self.batch)


def conclude(
    of: str,
    sizes: Sequence[int],
    rows: Sequence[Row],
    held: Sequence[int],
    formulas: Mapping[str, Sequence[float]],
) -> tuple[dict[str, Any], list[str]]:
    """`held`: bytes. `formulas`: of time, CPU time and memory at each size, in any
    unit.
    """
    times = {"time": [row.step_ms for row in rows], "CPU time": [row.cpu_ms for row in rows]}
    measured: dict[str, list[Any]] = {
        name: list(zip(*values, strict=True))
        for name, values in times.items()
        if all(map(all, values))  # else it was not measured
    }
    measured["memory"] = [held]
    growths = [Growth.judge(name, sizes, rounds, formulas[name]) for name, rounds in measured.items()]
    figures = {"with": of, "sizes": list(sizes), "held_bytes": list(held)}
    return figures | {"growths": [asdict(one) for one in growths]}, format_growths(of, growths)


def format_growths(of: str, growths: Sequence[Growth]) -> list[str]:
    lines = [f"{f'with {of}':14}{'fitted':>10}{'range':>14}{'last two':>10}{'formula':>10}{'last two':>10}"]
    for one in growths:
        spread = f"{one.lowest:.2f}-{one.highest:.2f}"
        verdict = f"faster than its formula by more than {TOLERANCE:.2f}" if one.faster else ""
        lines.append(
            f"{one.of:14}{one.measured.fitted:10.2f}{spread:>14}{one.measured.last:10.2f}"
            f"{one.formula.fitted:10.2f}{one.formula.last:10.2f}  {verdict}".rstrip()
        )
    return lines


def contest_of(
    title: str, of: str, sizes: Sequence[int], contenders: Sequence[OfSize], numbers: Sequence[float]
) -> Contest:
    """Of one step at these sizes."""

    def finish(rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
        held = [row.peak_bytes - one.contender.keeps() for row, one in zip(rows, contenders, strict=True)]
        flops = [one.flops or 0 for one in contenders]
        formulas = {"time": flops, "CPU time": flops, "memory": numbers}
        return conclude(of, sizes, rows, held, formulas)

    return Contest(f"growth: {title}", contenders, {}, contenders[0].images or 0, conclude=finish)


def growth(workload: Workload, run: Run) -> Iterator[Contest]:
    for stage in (pretraining, vqkd):
        yield grow_images(stage, workload, run)
    yield grow_tokens(workload, run)
    yield grow_codes(workload, run)
    yield from grow_ranks(workload, run)


def grow_images(stage: Callable[[Workload, Run], Iterator[Contest]], workload: Workload, run: Run) -> Contest:
    sizes = [times * workload.batch_size for times in TIMES]
    contenders, title = [], ""
    for size in sizes:
        contest = next(stage(replace(workload, batch_size=size), run))
        title, ours = contest.name, contest.contenders[0]
        assert isinstance(ours, Local)
        contenders.append(OfSize(f"{size} images", ours, contest.batch, size, contest.flops))
    return contest_of(title, "images", sizes, contenders, sizes)


def grow_tokens(workload: Workload, run: Run) -> Contest:
    """Of a fine-tuning step."""
    name = variant(modeling_finetune.MODELS, workload.model)
    row = SIZES[modeling_finetune.MODELS[name].size]
    bias = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}
    sizes, contenders, numbers = [], [], []
    for side in SIDES:
        model = modeling_finetune.create_model(name, num_classes=CLASSES, img_size=side, **bias)
        ours = Ours(FinetuningStage(run.device, run.precision), model.to(run.device), run)
        batch = random_batch(workload.batch_size, side, run.device)
        keeps = functools.partial(bytes_of, model, optimizer=ours.state.optimizer)
        step, tokens = Local("", ours, run.device, keeps), 1 + model.patch_embed.num_patches
        contenders.append(OfSize(f"{tokens} tokens", step, batch, workload.batch_size, ours.flops(batch)))
        ours.compile(workload)
        sizes.append(tokens)
        weights = row.num_heads * tokens  # of attention, for a token of a block
        numbers.append(tokens * (row.depth * (19 * row.embed_dim + weights) + 2 * weights))
    return contest_of(f"finetune {name}, {workload.batch_size} images", "tokens", sizes, contenders, numbers)


def grow_codes(workload: Workload, run: Run) -> Contest:
    images = 8 * workload.batch_size
    batch = {"z": torch.randn(images, 32, 14, 14, device=run.device)}
    contenders = []
    for codes in CODES:
        module = NormEMAVectorQuantizer(codes, 32).to(run.device).train()
        with FlopCounterMode(display=False) as counter:
            copy.deepcopy(module)(batch["z"])
        step = quantization("", module, run)
        contenders.append(OfSize(f"{codes} codes", step, batch, images, counter.get_total_flops()))
    return contest_of(f"quantizer of dim 32, {images} images", "codes", CODES, contenders, CODES)


class Ranks(Contender):
    """Pretraining steps of as many processes, each with images of its own, one thread,
    and a core of its own where there are as many.
    """

    def __init__(self, count: int, workload: Workload, amp_dtype: str) -> None:
        self.name, self.images = f"{count} rank{'s' if count > 1 else ''}", count * workload.batch_size
        words = [workload.model, str(workload.batch_size), amp_dtype, str(STEPS)]
        meeting = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes, self.buckets, cores = [], 0, list_cores()
        for rank in range(count):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting} if count > 1 else {}
            environ = {"OMP_NUM_THREADS": "1", **ranks}
            self.processes.append(StepProcess(words, environ, cores[rank % len(cores)]))

    def ask(self, question: str) -> list[dict[str, Any]]:
        for process in self.processes:
            process.ask(question)
        return [process.answer() for process in self.processes]

    def turn(self, batch: dict[str, Any]) -> Turn:
        replies = self.ask("steps")
        loss = statistics.mean(reply["loss"] for reply in replies)
        ms, cpu_ms = (max(reply[name] for reply in replies) for name in ("ms", "cpu_ms"))
        return Turn(loss, {"forward": ms}, cpu_ms)

    def peak(self, batch: dict[str, Any]) -> int:
        """Of a rank, with the buckets in which DDP exchanges gradients."""
        (reply, *_) = self.ask("peak")
        self.buckets = reply["buckets"]
        return reply["peak"]

    def close(self) -> None:
        for process in self.processes:
            process.end()
        for process in self.processes:
            process.close()


def grow_ranks(workload: Workload, run: Run) -> Iterator[Contest]:
    """On CPUs. With a core for each a step should take as long as that of one rank, and
    each should hold as much as that one, and its buckets.
    """
    amp_dtype = "bf16" if run.precision.dtype is torch.bfloat16 else "fp32"
    cores, contenders = len(list_cores()), [Ranks(count, workload, amp_dtype) for count in RANKS]

    def finish(rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
        held = [row.peak_bytes for row in rows]
        formulas: dict[str, Sequence[float]] = {
            "time": [max(1.0, count / cores) for count in RANKS],
            "CPU time": [1] * len(RANKS),
            "memory": [held[0] + one.buckets for one in contenders],
        }
        figures, lines = conclude("ranks", RANKS, rows, held, formulas)
        speedups = [
            RANKS[-1] / RANKS[0] * one / many
            for one, many in zip(rows[0].step_ms, rows[-1].step_ms, strict=True)
        ]
        figures |= {"speedup": statistics.median(speedups), "speedups": speedups}
        lines.append(
            f"{rows[-1].name}: {figures['speedup']:.2f} ({min(speedups):.2f}-{max(speedups):.2f}) times the "
            f"images/s of {rows[0].name}; goal on {RANKS[-1]} cores: {GOAL}"
        )
        return figures, lines

    try:
        title = f"{workload.model} pretraining, {workload.batch_size} images a rank, {cores} cores"
        yield Contest(f"growth: {title}", contenders, {}, workload.batch_size, conclude=finish)
    finally:
        for contender in contenders:
            contender.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
