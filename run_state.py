"""A run: its options, where it computes, the data it reads, and how its model is
wrapped. How it is saved and resumed: run_checkpoints.py.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import arguments
from checkpoint_io import checkpoints, resumption
from checkpoint_io.training_state import TrainState
from data_pipeline import samplers
from data_pipeline.files import SampleDataset
from data_pipeline.samplers import Loader, LoaderSettings, ResumableSampler, build_loader
from errors import UserError, count
from layers import cpu_bf16
from layers.meant_device import is_cpu
from monitoring import profiling
from monitoring.trackers import check_trackers
from runtime import compilation, distributed, fsdp, signals
from runtime.device import Precision, choose_precision
from runtime.distributed import Launch
from runtime.run_lock import RunLock
from runtime.seeding import seed_all
from runtime.terminal import git_commit, log
from vit_backbone import Block, recompute_blocks


@dataclass(frozen=True)
class RunOptions:
    """What the loop must know of the flags, under their names."""

    # what it writes, and how often
    output_dir: str = ""
    log_dir: str | None = None
    peak_tflops: float | None = None
    profile: int = 0
    memory_snapshot: bool = False
    track: tuple[str, ...] = ()
    save_ckpt: bool = True
    save_ckpt_freq: int = 1
    save_ckpt_steps: int = 0
    keep_ckpts: int = 0
    print_freq: int = 20
    eval_freq: int = 1
    image_freq: int = 0
    # where it goes on from
    resume: str = ""
    auto_resume: bool = True
    start_epoch: int = 0
    cooldown_from: str = ""
    # on what it runs
    device: str = "cuda"
    amp_dtype: str = "auto"
    dist_url: str = "env://"
    dist_on_itp: bool = False
    dist_timeout: float = 30.0
    detect_anomaly: bool = False
    # a step
    seed: int = 0
    epochs: int | None = None  # None: the run is counted in steps
    batch_size: int = 64
    update_freq: int = 1
    num_workers: int = 0
    pin_mem: bool = True
    data_path: str = ""
    opt: str = "adamw"
    clip_grad: float | None = None
    compile: bool = False
    grad_checkpointing: bool = False
    fsdp: bool = False
    model_ema_force_cpu: bool = False


@dataclass
class Run:
    """Where and how this process computes."""

    options: RunOptions
    launch: Launch
    device: torch.device
    precision: Precision
    flags: dict[str, Any] = field(default_factory=dict)  # all of the command line, as plain data
    config: dict[str, Any] = field(default_factory=dict)  # for flags.json
    typed: arguments.Flags = field(default_factory=arguments.Flags)  # the same, as they were parsed
    changed_flags: dict[str, Any] = field(default_factory=dict)  # from their defaults
    data: dict[str, Any] = field(default_factory=dict)  # for checkpoints: images, digest of their names
    resumed: tuple[Path | None, dict[str, Any]] | None = None  # of run_checkpoints.find_resumed
    lock: RunLock | None = None  # of rank 0, while it trains
    saver: checkpoints.Saver = field(default_factory=checkpoints.Saver)
    started: float = field(default_factory=time.monotonic)

    @property
    def output_dir(self) -> Path | None:
        return Path(self.options.output_dir) if self.options.output_dir else None

    @property
    def is_sharded(self) -> bool:
        """`fsdp`, and more processes than one."""
        return self.options.fsdp and self.launch.world_size > 1

    def write_flags(self) -> None:
        """output_dir/flags.json, which --config reads back to the same run."""
        if self.output_dir is not None and self.config:
            checkpoints.write_json(self.output_dir, "flags.json", self.config)


def start_run(parser: argparse.ArgumentParser, args: arguments.Flags, trains: bool = True) -> Run:
    """Join the other processes, choose device and precision, seed, log what was asked
    for, and open the output folder.

    trains: the run writes checkpoints, so no other run may write to the same folder.
    """
    options = arguments.options(RunOptions, args)
    if trains:
        signals.end_between_steps()
    launch, device = distributed.start(
        options.device, options.dist_url, options.dist_on_itp, options.dist_timeout
    )
    check_trackers(options.track if trains else ())
    if options.compile:
        compilation.require_compiler(device)
    if trains:
        profiling.check(options.profile, options.memory_snapshot, options.output_dir, device)
    precision = choose_precision(options.amp_dtype, device)
    flags = checkpoints.to_plain_data(args.plain())
    lock = open_output(options.output_dir, trains)
    config = args.to_config(given_only=not trains)
    run = Run(options, launch, device, precision, flags, config, typed=args, lock=lock)
    resumption.check_ranks_agree(flags)
    resumption.check_start_epoch(options.start_epoch, options.epochs)
    if run.is_sharded:
        fsdp.check_options(options.opt, options.compile, options.model_ema_force_cpu, device)
    seed_all(options.seed, device)  # the same on every rank: all build the same model
    log.info(f"── {parser.description} ──")
    run.changed_flags = arguments.changed_flags(parser, args)
    log_setup(run)
    arguments.warn_of_obsolete_flags(parser, args)
    torch.autograd.set_detect_anomaly(options.detect_anomaly)
    if not trains and not (Path(options.output_dir) / checkpoints.LATEST).exists():
        run.write_flags()  # beside a checkpoint lie those of its training
    return run


def log_setup(run: Run) -> None:
    log.info(f"flags      {', '.join(f'{k}={v}' for k, v in run.changed_flags.items()) or 'all default'}")
    is_gpu, cpu = run.device.type == "cuda", f"cpu, {count(torch.get_num_threads(), 'thread')}"
    name = torch.cuda.get_device_name(run.device) if is_gpu else cpu
    log.info(f"device     {run.launch.world_size} x {name}, {run.precision}")
    log.info(f"code       commit {git_commit()}, torch {torch.__version__}")
    log.info(f"output     {run.options.output_dir or 'nowhere: without `output_dir` nothing is kept'}")
    if run.options.fsdp and not run.is_sharded:
        log.info("fsdp       nothing to shard: there is one process (a launcher starts several)")


def open_output(output_dir: str, trains: bool) -> RunLock | None:
    """Make the folder; on rank 0 of a run that trains, lock it and remove what a killed
    run left half-written.
    """
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
        raise UserError(f"`output_dir` {output_dir}: cannot be written to ({error.strerror})") from None
    return lock


@dataclass(frozen=True)
class TrainingData:
    """The loader and what the loop must know of it."""

    sampler: ResumableSampler
    loader: Loader

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch


def build_training_data(
    dataset: SampleDataset, run: Run, num_workers: int | None = None, labels: np.ndarray | None = None
) -> TrainingData:
    """`num_workers`: 0 for what is in memory already; default: the run's. `labels`: an
    epoch has their classes equally often.
    """
    options, launch = run.options, run.launch
    workers = options.num_workers if num_workers is None else num_workers
    sampler = ResumableSampler(
        len(dataset),
        options.batch_size,
        options.update_freq,
        launch.rank,
        launch.world_size,
        options.seed,
        shard_sizes=dataset.shard_sizes,
        labels=labels,
    )
    loader = build_loader(
        dataset, sampler, workers, options.pin_mem and run.device.type == "cuda", persistent=True
    )
    ways = f"x {launch.world_size} processes x {options.update_freq}"
    if sampler.shrunk:
        log.warning(
            f"warning: {len(dataset)} images do not fill one batch of {options.batch_size} {ways}: each "
            "epoch is one step over all of them"
        )
    batch, factors = sampler.global_batch, f" ({sampler.batch_size} {ways})"
    log.info(
        f"data       {len(dataset):,} images, effective batch {batch}"
        f"{'' if batch == sampler.batch_size else factors}, {count(sampler.steps_per_epoch, 'step')} an epoch"
    )
    run.data.update(images=len(dataset), digest=dataset.digest(options.data_path))
    resumption.check_ranks_have_the_same_images(run.data)
    return TrainingData(sampler, loader)


def build_eval_loader(
    dataset: SampleDataset,
    run: Run,
    batch_size: int | None = None,
    num_workers: int | None = None,
    every: int = 1,
) -> Loader:
    """This rank's share of images to evaluate on; `every`: only every n-th image.
    Without `batch_size` and `num_workers`, those of the run.
    """
    options = run.options
    workers = options.num_workers if num_workers is None else num_workers
    settings = LoaderSettings(batch_size or options.batch_size, workers, options.pin_mem)
    return samplers.build_eval_loader(dataset, settings, run.launch, run.device, every)


def move_to_device(run: Run, model: nn.Module, ema: ModelEmaV3 | None = None) -> None:
    """The model, and its average where it is not kept elsewhere, to this process's
    device: whole, or (`fsdp`) its share.

    Before the optimizer, which must be given the parameters that are there then.
    """
    moves = [model] if ema is None or ema.device is not None else [model, ema.module]
    for network in moves:
        if run.is_sharded:
            fsdp.shard(network, run.device, Block, run.precision.dtype)
        else:
            network.to(run.device)


def new_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, run: Run, name: str, ema: ModelEmaV3 | None = None
) -> TrainState:
    """Wrap the model for as many processes as there are. It is on its device already.
    `name`: for the log.
    """
    if run.options.grad_checkpointing:
        recompute_blocks(model)
    if is_cpu(run.device):
        cpu_bf16.swap_in(model)
    runner = model
    if run.launch.world_size > 1 and not run.is_sharded:
        # No device_ids: what the model takes is on its device already. Buffers are not
        # broadcast: the quantizer keeps its own equal everywhere. (Newer torch renames
        # the flag and warns.) Every step is the same graph, so no search for unused
        # parameters, and one without a gradient is no error. Torch refuses that with a
        # first micro-batch that is not exchanged.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            runner = DistributedDataParallel(
                model,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                static_graph=run.options.update_freq == 1,
            )
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision.dtype is torch.float16)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(f"model      {name}, {count / 1e6:.2f} M trainable parameters")
    return TrainState(model, runner, optimizer, scaler, ema, epoch=run.options.start_epoch)
