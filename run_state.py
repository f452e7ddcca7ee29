"""What a run is: where it computes, the data it reads, all that changes while it trains,
and how that is saved and restored.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import arguments
from checkpoint_io import checkpoints, resumption
from data_pipeline.files import SampleDataset
from data_pipeline.samplers import Loader, ResumableSampler, build_loader
from errors import UserError
from layers import cpu_bf16
from optim_factory import check_saved_state
from runtime import compilation, distributed, fsdp, signals
from runtime.distributed import Launch, Precision, choose_precision, log
from runtime.metrics import RunningMeans
from runtime.run_lock import RunLock
from utils import seed_all
from vit_backbone import Block, recompute_blocks


class Stage:
    """What the loop asks of a stage. `step` is the paper; the rest has defaults."""

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch -> (loss (), scalars for the log, the same names every time). Runs under autocast."""
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """At an epoch's first step; not when a run resumes in its middle."""

    def before_step(self, step: int) -> None:
        """`step` counts the optimizer steps of the whole run."""

    def end_epoch(self) -> dict[str, float]:
        """More entries for the epoch's line in log.txt, without the `train_` in front."""
        return {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Entries for log.txt, with their `test_` in front; {} where there is nothing to evaluate on."""
        return {}

    def probe(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """More entries like evaluate's, from an evaluation with a frequency of its own; {}
        where none is due after `epoch`.
        """
        return {}

    def better(self, test: dict[str, float]) -> float | None:
        """What to maximize for checkpoint-best.pth; None: this stage has no best."""
        return None

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """Name -> image (3, height, width) in [0, 1], for TensorBoard and output_dir/pictures."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the stage must remember between steps, as tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo state_dict."""


# ── Setting up ──


@dataclass(frozen=True)
class Run:
    """Where and how this process computes."""

    args: argparse.Namespace
    launch: Launch
    device: torch.device
    precision: Precision
    # how many images, and a digest of their names: for checkpoints
    data: dict[str, Any] = field(default_factory=dict)
    lock: RunLock | None = None  # of rank 0, while it trains
    saver: checkpoints.Saver = field(default_factory=checkpoints.Saver)
    started: float = field(default_factory=time.monotonic)

    @property
    def output_dir(self) -> Path | None:
        return Path(self.args.output_dir) if self.args.output_dir else None

    @property
    def sharded(self) -> bool:
        """--fsdp, and more processes than one."""
        return getattr(self.args, "fsdp", False) and self.launch.world_size > 1


def start_run(parser: argparse.ArgumentParser, args: argparse.Namespace, trains: bool = True) -> Run:
    """Join the other processes, choose device and precision, seed, say what was asked for,
    and open the output folder.

    trains: the run writes checkpoints, so no other run may in the same folder.
    """
    if trains:
        signals.end_between_steps()
    launch, device = distributed.start(args.device, args.dist_url, args.dist_on_itp, args.dist_timeout)
    if getattr(args, "compile", False):  # a flag of the stages that train a ViT, as is the next
        compilation.require_compiler(device)
    run = Run(
        args,
        launch,
        device,
        choose_precision(args.amp_dtype, device),
        lock=open_output(args.output_dir, trains),
    )
    resumption.check_ranks_agree(checkpoints.to_plain_data(args.plain()))
    check_start_epoch(args)
    if run.sharded:
        fsdp.check(args, device)
    seed_all(args.seed, device)  # the same on every rank: all build the same model
    log.info(f"── {parser.description} ──")
    log.info(
        "flags      "
        + (", ".join(f"{k}={v}" for k, v in arguments.changed_flags(parser, args).items()) or "all default")
    )
    place = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    log.info(f"device     {launch.world_size} x {place}, {run.precision}")
    log.info(f"code       commit {git_commit()}, torch {torch.__version__}")
    log.info(f"output     {args.output_dir or 'nowhere: without --output_dir nothing is kept'}")
    if getattr(args, "fsdp", False) and not run.sharded:
        log.info("fsdp       nothing to shard: there is one process (a launcher starts several)")
    arguments.warn_of_obsolete_flags(parser, args)
    torch.autograd.set_detect_anomaly(args.detect_anomaly)
    return run


def open_output(output_dir: str, trains: bool) -> RunLock | None:
    """Make the folder; on rank 0 of a run that trains, lock it and remove what a killed run left half-written."""
    if not output_dir:
        return None
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (trains and distributed.is_main()):
            return None
        lock = RunLock(folder)
        try:
            # before the lock is signed, which a full disk would not allow
            checkpoints.remove_leftovers(folder)
            lock.sign()
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written to ({error.strerror})") from None
    return lock


def check_start_epoch(args: argparse.Namespace) -> None:
    epochs = getattr(args, "epochs", None)  # one stage is counted in steps
    if args.start_epoch < 0 or (epochs is not None and args.start_epoch >= epochs):
        raise UserError(
            f"--start_epoch {args.start_epoch} leaves nothing to do: give 0 up to "
            f"{'' if epochs is None else epochs - 1}, the "
            "last epoch, or raise --epochs"
        )


def git_commit() -> str:
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@dataclass(frozen=True)
class TrainingData:
    """The loader and what the loop must know of it."""

    sampler: ResumableSampler
    loader: Loader

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch


def training_data(dataset: SampleDataset, run: Run, num_workers: int | None = None) -> TrainingData:
    """`num_workers`: 0 for what is in memory already; default: --num_workers."""
    args, launch = run.args, run.launch
    workers = args.num_workers if num_workers is None else num_workers
    sampler = ResumableSampler(
        len(dataset),
        args.batch_size,
        args.update_freq,
        launch.rank,
        launch.world_size,
        args.seed,
        shard_sizes=dataset.shard_sizes,
    )
    loader = build_loader(
        dataset, sampler, workers, args.pin_mem and run.device.type == "cuda", persistent=True
    )
    if sampler.shrunk:
        log.warning(
            f"warning: {len(dataset)} images do not fill one batch of {args.batch_size} x "
            f"{launch.world_size} processes x "
            f"{args.update_freq}: each epoch is one step over all of them"
        )
    log.info(
        f"data       {len(dataset):,} images, effective batch {sampler.global_batch} "
        f"({sampler.batch_size} x {launch.world_size} processes x {args.update_freq}), "
        f"{sampler.steps_per_epoch} steps an epoch"
    )
    run.data.update(images=len(dataset), digest=dataset.digest(args.data_path))
    resumption.check_ranks_have_the_same_images(run.data)
    return TrainingData(sampler, loader)


@dataclass
class TrainState:
    """All that changes while training, and with it all that a checkpoint holds."""

    model: nn.Module  # what is saved
    runner: nn.Module  # what is called: the model or its DDP wrapper
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    samples: int = 0  # of this epoch, over all ranks, already used
    step: int = 0  # optimizer steps of the whole run
    best: float = -math.inf
    means: RunningMeans = field(default_factory=RunningMeans)
    bad_in_a_row: int = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def compile_networks(run: Run, data: TrainingData, *networks: Any) -> None:
    """--compile, for the model and the frozen networks beside it. Before the first step:
    weights are loaded, averages begun.
    """
    if run.args.compile:
        count = compilation.compile_networks(data.sampler.batch_size, *networks)
        log.info(f"compile    {count} parts of the networks, in the first step (a minute or more)")


def place(run: Run, model: nn.Module, ema: ModelEmaV3 | None = None) -> None:
    """The model, and its average where it is not kept elsewhere, to this process's device:
    whole, or (--fsdp) its share.

    Before the optimizer, which must be given the parameters that are there then.
    """
    moves = [model] if ema is None or ema.device is not None else [model, ema.module]
    for network in moves:
        if run.sharded:
            fsdp.shard(network, run.device, Block)
        else:
            network.to(run.device)


def new_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Run,
    ema: ModelEmaV3 | None = None,
    name: str = "",
) -> TrainState:
    """Wrap the model for as many processes as there are. It is on its device already.
    `name`: for the log, if not --model.
    """
    if getattr(run.args, "grad_checkpointing", False):
        recompute_blocks(model)
    if run.device.type == "cpu":
        cpu_bf16.swap_in(model)
    runner = model
    if run.launch.world_size > 1 and not run.sharded:
        # No device_ids: DDP would move the mask to the GPU, whose positions are listed
        # on the host. Buffers are not broadcast: the quantizer keeps its own equal
        # everywhere. (Newer torch renames the flag and warns.) Every step is the same
        # graph, so no search for unused parameters, and one without a gradient is no
        # error. Torch refuses that with a first micro-batch that is not exchanged.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            runner = DistributedDataParallel(
                model,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                static_graph=run.args.update_freq == 1,
            )
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision.dtype is torch.float16)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(f"model      {name or run.args.model}, {count / 1e6:.2f} M trainable parameters")
    return TrainState(model, runner, optimizer, scaler, ema, epoch=run.args.start_epoch)


# ── Checkpoints ──


def save(state: TrainState, stage: Stage, run: Run, epoch: int, names: list[str]) -> None:
    """Write a checkpoint on rank 0 under each of `names`, in the background. `state` says
    where to go on, `epoch` which one this was. All ranks call it: what is sharded they
    gather together.
    """
    output_dir = run.output_dir
    if output_dir is None or not getattr(run.args, "save_ckpt", True):
        return
    own = state.means.state_dict()
    means = list(distributed.gather_objects(own)) if run.launch.world_size > 1 else [own]
    if not (distributed.is_main() or run.sharded):
        return
    if not output_dir.is_dir():
        raise UserError(
            f"--output_dir {output_dir} was removed while the run was writing to it: "
            "start the same line again"
        )
    content = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "epoch": epoch,
        "args": checkpoints.to_plain_data(run.args.plain()),
        "next": {"epoch": state.epoch, "samples": state.samples, "step": state.step},
        "best": state.best,
        "bad_in_a_row": state.bad_in_a_row,
        "means": means,  # each process has those of its part of the epoch
        "data": dict(run.data),
        "stage": stage.state_dict(),
        "world_size": run.launch.world_size,
    }
    if state.ema is not None:
        content["model_ema"] = state.ema.module.state_dict()
    run.saver.submit(content, output_dir, names, run.args.keep_ckpts)


def resume(state: TrainState, stage: Stage, run: Run, steps_per_epoch: int) -> None:
    """Go on from --resume, or from output_dir/checkpoint.pth, if there is one; all ranks from the same place."""
    path = checkpoints.find_checkpoint(run.args.resume, run.args.auto_resume, run.args.output_dir)
    if path is not None:
        restore(state, stage, run, path, steps_per_epoch)
    places = distributed.gather_objects((state.epoch, state.samples, state.step))
    if len(set(places)) > 1:
        raise UserError(
            f"the processes would start at different places (epoch, samples, step): {sorted(set(places))}; "
            "--output_dir must be one folder that all machines see"
        )


def restore(state: TrainState, stage: Stage, run: Run, path: Path, steps_per_epoch: int) -> None:
    """Undo `save`. Optimizer settings (betas, layer decay, ...) are this run's flags, its
    moments are the checkpoint's.
    """
    content = checkpoints.read_checkpoint(path)
    resumption.check_same_run(content, checkpoints.to_plain_data(run.args.plain()), run.data, path)
    checkpoints.load_weights(state.model, content["model"], path)
    if state.ema is not None:
        checkpoints.load_weights(state.ema.module, content.get("model_ema", content["model"]), path)
    if "next" not in content and run.output_dir and distributed.is_main():
        checkpoints.keep_published(path, run.output_dir)
    if resumption.is_published(content):
        content = resumption.convert_published(content, steps_per_epoch, run.launch.world_size)
    if "optimizer" not in content or "next" not in content:
        log.info(f"{path} holds weights alone: training starts at epoch {state.epoch}")
        return
    before = content.get("args", {}).get("opt", run.args.opt)
    if before != run.args.opt:
        raise UserError(
            f"{path} holds the state of --opt {before}, not of {run.args.opt}: go on with --opt {before}"
        )
    load_optimizer(state, content["optimizer"], path)
    try:
        restore_progress(state, stage, run, content)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} is no complete training checkpoint of this code ({type(error).__name__}: "
            f"{error}): take another one, or "
            "start from its weights with --finetune"
        ) from None
    log.info(f"resumed    {path}: epoch {state.epoch}, {state.samples} samples into it, step {state.step}")
    if content["world_size"] != run.launch.world_size:
        log.warning(
            f"warning: the checkpoint comes from {content['world_size']} processes, now there are "
            f"{run.launch.world_size}: "
            "the run goes on from the same sample, but no longer bit for bit"
        )


def load_optimizer(state: TrainState, saved: Any, path: Path) -> None:
    """The moments of a checkpoint, under this run's settings; each in memory of its own,
    laid out like its parameter.
    """
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    optimizer = state.optimizer
    check_saved_state(saved, optimizer, names, str(path))
    settings = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(fsdp.shares_of_moments(saved, optimizer))
    for moments in optimizer.state.values():
        for key, value in moments.items():
            if isinstance(value, Tensor) and not fsdp.is_share(value):  # shares are copies already
                moments[key] = value.clone(memory_format=torch.contiguous_format)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def restore_progress(state: TrainState, stage: Stage, run: Run, content: dict[str, Any]) -> None:
    """Where training stands: all of a checkpoint but weights and moments."""
    if content["scaler"] and state.scaler.is_enabled():
        scale = float(content["scaler"]["scale"])
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"the gradient scaler's scale is {scale}")
        state.scaler.load_state_dict(content["scaler"])
    place = [content["next"][key] for key in ("epoch", "samples", "step")]
    if not all(isinstance(number, int) and number >= 0 for number in place):
        raise ValueError(f"epoch, samples, step: {place}")
    state.epoch, state.samples, state.step = place
    state.best, state.bad_in_a_row = float(content["best"]), int(content["bad_in_a_row"])
    restore_means(state, run, content["means"])
    if content["stage"] is not None:
        stage.load_state_dict(content["stage"])
    int(content["world_size"])


def restore_means(state: TrainState, run: Run, saved: Any) -> None:
    """To each process its own, or to rank 0 the sum of all where there are others now.
    Earlier code kept rank 0's alone.
    """
    parts = [saved] if isinstance(saved, dict) else list(saved)
    if len(parts) == run.launch.world_size:
        state.means.load_state_dict(parts[run.launch.rank], run.device)
    elif distributed.is_main():
        filled = [part for part in parts if part["sums"] is not None]
        if filled:
            sums = torch.stack([part["sums"] for part in filled]).sum(0)
            state.means.load_state_dict({"names": filled[0]["names"], "sums": sums}, run.device)
