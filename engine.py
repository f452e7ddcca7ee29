"""The only training loop. A stage defines what a step computes; this file takes the
step.

Precision, accumulation, clipping, schedule, the check for non-finite steps, moving
averages, progress, log.txt, TensorBoard, pictures and checkpoints are the same for
every stage. Above 300 lines, so that a step can be followed from the loop down to the
optimizer without leaving the file.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import run_checkpoints
from checkpoint_io import checkpoints
from checkpoint_io.training_state import TrainState
from data_pipeline.files import BadFiles
from data_pipeline.samplers import close
from errors import UserError, count
from monitoring import alarms, environment
from monitoring.alarms import REPORTS_KEPT, Alarms, Found, Line
from monitoring.profiling import StepProfiler
from monitoring.progress import Remark
from monitoring.reporter import Reporter, RunCounts
from monitoring.run_files import epoch_line
from monitoring.tracked_run import describe_run
from monitoring.trackers import open_trackers
from run_state import Run, TrainingData
from runtime import compilation, distributed, flops, fsdp
from runtime.device import Precision, to_device
from runtime.failures import explain_errors
from runtime.flops import StepFlops
from runtime.metrics import RunningMeans
from runtime.phases import BACKWARD, COPY, FORWARD, OPTIMIZER, phase
from runtime.seeding import derive_seed, seed_all
from runtime.signals import StopSignal
from runtime.skipped_steps import SkippedSteps
from runtime.terminal import format_clock, log
from schedules import Schedule


class Stage:
    """What the loop asks of a stage. `step` implements the paper; the rest has
    defaults.
    """

    def __init__(self, device: torch.device, precision: Precision) -> None:
        self.device, self.precision = device, precision

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch -> (loss (), scalars for the log, the same names every time).
        Runs under autocast.
        """
        raise NotImplementedError

    def rehearse(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """What `step` computes, of a model in eval mode: only to be counted."""
        self.step(model, batch)

    def start_epoch(self, epoch: int) -> None:
        """At an epoch's first step; not when a run resumes in its middle."""

    def before_step(self, step: int) -> None:
        """`step` counts the optimizer steps of the whole run."""

    def more_figures(self) -> dict[str, float]:
        """Figures of the epoch so far, for each report: beside the means of what `step`
        returns. The one place where a stage may read from the device.
        """
        return {}

    def end_epoch(self) -> dict[str, float]:
        """More entries for the epoch's line in log.txt, without the `train_` in
        front.
        """
        return {}

    def remark(self, step: int) -> Remark | None:
        """What a reader of the figures must know after `step` steps of the run; None:
        they speak for themselves.
        """
        return None

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Entries for log.txt, with their `test_` in front; {} where there is nothing
        to evaluate on.
        """
        return {}

    def has_extra_metrics(self, epoch: int) -> bool:
        """Whether evaluations with frequencies of their own are due after `epoch`."""
        return False

    def extra_metrics(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Those evaluations: more entries like those of `evaluate`."""
        return {}

    def find_alarms(self, line: Line, earlier: Sequence[Line], warmed_up: bool) -> Found:
        """What this epoch's `line` of log.txt shows to be wrong (monitoring/alarms.py).

        `earlier`: the lines of the epochs before it that began after the warm-up of the
        learning rate; `warmed_up`: whether this one did.
        """
        return {}

    def best_metric(self, test: dict[str, float]) -> float | None:
        """What to maximize for checkpoint-best.pth; None: this stage has no best."""
        return None

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """Name -> image (3, height, width) in [0, 1], for TensorBoard and
        output_dir/pictures.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the stage must remember between steps, as tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo state_dict."""


class Stopped(Exception):
    """The run was asked to stop, and its state is saved."""


@dataclass
class Trainer:
    """One run: its settings, stage, data, schedule and mutable state. Constructing it
    trains nothing.
    """

    run: Run
    stage: Stage
    data: TrainingData
    schedule: Schedule
    state: TrainState
    # while it trains
    epochs: int = field(init=False)
    reporter: Reporter = field(init=False)
    flops: StepFlops = field(init=False)
    profiler: StepProfiler = field(init=False)
    alarms: Alarms = field(init=False)
    skipped: SkippedSteps = field(init=False)
    bad_files: BadFiles = field(init=False)
    stop_signal: StopSignal = field(init=False)

    def resume(self) -> None:
        """Go on from `resume`, or from output_dir/checkpoint.pth, if there is one, else
        from `cooldown_from`.
        """
        state, options = self.state, self.run.options
        run_checkpoints.resume(state, self.stage, self.run, self.data.steps_per_epoch)
        if options.cooldown_from and state.cooldown_start is None:
            state.cooldown_start = state.epoch * self.data.steps_per_epoch + self.steps_done()
        if state.cooldown_start is not None:
            self.schedule = self.schedule.cool_down(state.cooldown_start)
            last = len(self.schedule.lr)
            log.info(f"cool-down  of the learning rate: steps {state.cooldown_start} to {last}")

    def compile(self, *networks: Any) -> None:
        """`compile`: the model, and the frozen `networks` beside it. After resuming:
        weights are loaded and averages begun.
        """
        if self.run.options.compile:
            parts = compilation.compile_networks(self.data.sampler.batch_size, self.state.model, *networks)
            log.info(f"compile    {parts} parts of the networks, in the first step (a minute or more)")

    def fit(self) -> None:
        """Train from where the state stands to the last epoch, or until a signal asks
        to stop; both are a success.
        """
        run, state, options = self.run, self.state, self.run.options
        self.epochs = self.count_epochs() if self.schedule.in_steps else cast(int, options.epochs)
        first_step = state.step
        distributed.end_set_up()
        with contextlib.ExitStack() as at_the_end:
            if run.lock is not None:
                at_the_end.callback(run.lock.release)
            at_the_end.enter_context(explain_errors(options.output_dir, options.log_dir or ""))
            run.write_flags()
            environment.write(run.output_dir, run.typed, run.flags, run.device, state.step)
            counts = RunCounts(self.epochs, state.epoch, state.step, self.data.sampler.global_batch)
            tracked = describe_run(
                options.output_dir, options.log_dir, run.flags, run.changed_flags, state.step
            )
            trackers = open_trackers(options.track, tracked)
            self.reporter = Reporter(
                options.output_dir, options.print_freq, run.device, counts, trackers, self.stage.remark
            )
            outcome = "failed"
            files = self.reporter.files
            lines = files.log.read("epoch") if files else []
            reports = files.metrics.read("step", REPORTS_KEPT) if files else []
            self.alarms = Alarms(lines, reports, clips=bool(options.clip_grad))
            self.reporter.peak_flops = flops.find_peak(run.device, run.precision, options.peak_tflops)
            self.flops = StepFlops(distributed.is_main() and self.reporter.peak_flops is not None)
            recorded = run.output_dir if distributed.is_main() else None
            self.profiler = StepProfiler(recorded, options.profile, options.memory_snapshot, run.device)
            log.info(self.describe())
            last_good = None if run.output_dir is None else run.output_dir / checkpoints.LATEST
            self.skipped = SkippedSteps(state, last_good, options.seed)
            self.bad_files = BadFiles()
            try:
                with StopSignal(options.dist_timeout) as self.stop_signal:
                    self.train_epochs()
                    self.stop_signal.finalize()
                refuse_a_run_without_a_step(state, first_step)
                outcome = "finished"
                log.info(f"finished epoch {self.epochs} in {format_clock(time.monotonic() - run.started)}")
            except Stopped as stopped:
                outcome = "stopped"
                log.info(f"stopped by {stopped} after step {state.step}: rerun the same command to resume")
            finally:
                close(self.data.loader)
                try:
                    run.saver.wait()
                    self.profiler.close()
                finally:
                    self.reporter.close(outcome)
        distributed.barrier()

    def describe(self) -> str:
        """What is ahead, in one line."""
        state, dataset, total = self.state, self.data.loader.dataset, len(self.schedule.lr)
        classes = len(getattr(dataset, "classes", None) or ())
        images = count(len(dataset), "image") + (f" of {classes:,} classes" if classes else "")
        per_epoch, start = count(self.data.steps_per_epoch, "step"), self.schedule_step()
        if start:
            epoch, done = f"epoch {state.epoch + 1} of {self.epochs}", count(self.steps_done(), "step")
            ahead = f"goes on after {done} of {epoch}, {total - start:,} of {count(total, 'step')} left"
        else:
            ahead = f"{count(self.epochs, 'epoch')}, {count(total, 'step')}"
        return f"training   {ahead}; an epoch is {per_epoch}, {images}"

    def schedule_step(self) -> int:
        """Where in the schedule the next step stands."""
        state = self.state
        if self.schedule.in_steps:
            return state.step
        return state.epoch * self.data.steps_per_epoch + self.steps_done()

    def count_epochs(self) -> int:
        """How many epochs a run that is counted in steps has, done ones included; the
        last may be cut.
        """
        into_epoch = self.state.samples // self.data.sampler.global_batch
        left = len(self.schedule.lr) - self.state.step
        return self.state.epoch + math.ceil((into_epoch + left) / self.data.steps_per_epoch)

    def train_epochs(self) -> None:
        """Train all epochs; each writes a line of log.txt and a checkpoint."""
        state, stage, options = self.state, self.stage, self.run.options
        for epoch in range(state.epoch, self.epochs):
            images = self.data.steps_per_epoch * options.update_freq * self.data.sampler.batch_size
            self.bad_files.start_epoch(images)
            skipped = state.skipped
            train = self.train_one_epoch() | stage.end_epoch()
            found = self.find_alarms_of_loop(state.skipped - skipped)
            state.epoch, state.samples = epoch + 1, 0
            # Evaluation starts data processes: no other thread may run while they are
            # forked.
            self.run.saver.wait()
            test = evaluate(state, stage) if self.is_due(epoch, options.eval_freq) else {}
            if stage.has_extra_metrics(epoch):
                with fsdp.gather_model(state.model) as model:
                    test |= stage.extra_metrics(model, epoch)
            # The line in log.txt first: a run killed between the two repeats the epoch,
            # and then replaces the line.
            self.reporter.epoch(epoch, state.step, train, test, self.judge(epoch, train, test, found))
            self.save(epoch, self.checkpoint_names(epoch, test))
            if options.image_freq and (epoch == 0 or self.is_due(epoch, options.image_freq)):
                with fsdp.gather_model(state.model) as model:
                    if self.reporter.shows_pictures:
                        self.reporter.pictures(epoch, state.step, stage.pictures(model))

    def find_alarms_of_loop(self, skipped: int) -> Found:
        """Whatever the stage: steps of this epoch that were `skipped`, and waiting for
        data, in the process that waited longest. At the end of the epoch's steps.
        """
        reporter, options = self.reporter, self.run.options
        waits = distributed.gather_objects((reporter.waited_in_epoch, reporter.seconds_of_epoch()))
        waited, seconds = max(waits)
        cores = alarms.cores_of_process()
        workers = min(options.num_workers, cores)
        exact = self.run.flags.get("data_pipeline") == "exact"
        found = alarms.skipped_steps(skipped, self.data.steps_per_epoch)
        return found | alarms.data_wait(waited, seconds, workers, cores, could_be_fast=exact)

    def judge(self, epoch: int, train: dict[str, float], test: dict[str, float], found: Found) -> list[str]:
        """The kinds of alarms that hold after `epoch`; new ones are told."""
        warm_up = max(int(self.schedule.lr.argmax()), alarms.LEAST_WARM_UP)  # in steps
        first = math.ceil(warm_up / self.data.steps_per_epoch)
        earlier = [line for line in self.alarms.lines if line["epoch"] >= first]
        line = epoch_line(epoch, train, test)
        return self.alarms.after_epoch(
            line, found | self.stage.find_alarms(line, earlier, warmed_up=epoch >= first)
        )

    def is_due(self, epoch: int, every: int) -> bool:
        """Every `every` epochs, and after the last."""
        return (epoch + 1) % every == 0 or epoch + 1 == self.epochs

    def checkpoint_names(self, epoch: int, test: dict[str, float]) -> list[str]:
        names = [checkpoints.LATEST]
        if self.is_due(epoch, self.run.options.save_ckpt_freq):
            names.append(f"checkpoint-{epoch}.pth")
        metric = self.stage.best_metric(test)
        better = metric is not None and metric > self.state.best_metric
        if better and math.isfinite(test.get("test_loss", 0.0)):
            self.state.best_metric = cast(float, metric)
            names.append(checkpoints.BEST)
        return names

    def save(self, epoch: int, names: list[str]) -> None:
        run_checkpoints.save(self.state, self.stage, self.run, epoch, names)

    def train_one_epoch(self) -> dict[str, float]:
        """The rest of the epoch in which the state stands; returns the epoch's means
        over all ranks.
        """
        state, data, schedule, options = self.state, self.data, self.schedule, self.run.options
        state.runner.train()
        if state.samples == 0:
            state.means = RunningMeans()
            self.stage.start_epoch(state.epoch)
        done = self.steps_done()
        start = self.schedule_step()
        steps = min(data.steps_per_epoch, done + len(schedule.lr) - start)
        if done >= steps:  # killed after the last step of an epoch: for its line in log.txt
            schedule.apply(state.optimizer, max(start - 1, 0))
        self.reporter.start_epoch(state.epoch, done, steps, state.step)
        batches = iter(data.loader)
        for step_in_epoch in range(done, steps):
            schedule_step = start + step_in_epoch - done
            schedule.apply(state.optimizer, schedule_step)
            self.stage.before_step(state.step)
            micro_batches = self.reporter.waiting_for(batches, options.update_freq)
            for batch in micro_batches:
                self.bad_files.add(batch["failed"], found_image="image" in batch)
            self.train_one_step(micro_batches)
            self.reporter.leave_out(self.profiler.end_step())
            left = len(schedule.lr) - schedule_step - 1
            if self.reporter.reports_at(state.step):
                self.skipped.raise_if_stuck()
                means, figures = state.means.report(), self.more_figures()
                self.reporter.step(means, current_lr(state), state.step, left, report=True, more=figures)
                self.alarms.after_report(means["grad_norm"])
            elif self.reporter.is_due(state.step):
                means = state.means.compute_new()
                self.reporter.step(means, current_lr(state), state.step, left, report=False)
            if options.save_ckpt_steps and state.step % options.save_ckpt_steps == 0:
                self.skipped.raise_if_stuck()
                more = [checkpoints.format_step_name(state.step)] if options.keep_ckpts > 0 else []
                self.save(state.epoch, [checkpoints.LATEST, *more])
            if self.stop_signal.requested():
                self.skipped.raise_if_stuck()
                self.save(state.epoch, [checkpoints.LATEST])
                raise Stopped(self.stop_signal.received or "a signal to another process")
            self.run.saver.raise_error()
        now = {"lr": current_lr(state)}
        if state.scaler.is_enabled():
            now["loss_scale"] = state.scaler.get_scale()
        return state.means.compute(over_all_ranks=True) | now

    def more_figures(self) -> dict[str, float]:
        """What a report says beside means and speed."""
        state = self.state
        figures: dict[str, float] = {"images": state.images, "skipped": state.skipped}
        if state.scaler.is_enabled():
            figures["loss_scale"] = state.scaler.get_scale()
        return figures | self.stage.more_figures()

    def steps_done(self) -> int:
        """Optimizer steps of the epoch in which the state stands; the sampler goes on
        behind them.
        """
        state, data = self.state, self.data
        data.sampler.set_position(state.epoch, state.samples)
        return data.steps_per_epoch - len(data.sampler) // self.run.options.update_freq

    def train_one_step(self, micro_batches: list[dict[str, Any]]) -> None:
        """Forward, backward, update: nothing here waits for the device."""
        state, device_transform = self.state, self.data.loader.dataset.device_transform
        if self.run.options.compile:
            self.flops.rehearse(state.model, self.rehearsal(micro_batches), len(micro_batches))
        with self.flops.observe():
            logs = accumulate_gradients(state, self.stage, micro_batches, self.run, device_transform)
        self.reporter.flops_per_step = self.flops.per_step
        with phase(OPTIMIZER):
            norm = take_step(state, self.run.options.clip_grad)
        self.skipped.add(logs["loss"], norm, micro_batches)
        state.means.add(logs | {"grad_norm": norm})
        state.step += 1
        state.samples += self.data.sampler.global_batch
        state.images += self.data.sampler.global_batch
        if state.ema is not None:
            with phase(OPTIMIZER):
                state.ema.update(state.model, state.step)

    def rehearsal(self, micro_batches: list[dict[str, Any]]) -> Callable[[], None]:
        """The first micro-batch's forward pass, of a copy: a stage may change a batch."""

        def forward() -> None:
            copied = {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in micro_batches[0].items()
            }
            batch = self.data.loader.dataset.device_transform(to_device(copied, self.run.device))
            with self.run.precision.autocast():
                self.stage.rehearse(self.state.model, batch)

        return forward


def refuse_a_run_without_a_step(state: TrainState, first_step: int) -> None:
    """A run that skipped each of its steps has trained nothing, which is not a
    success.
    """
    steps = state.step - first_step
    if steps and state.skipped_in_a_row >= steps:
        raise UserError(
            f"each of the {steps} steps of this run had a loss or gradient that is not finite, so nothing "
            "was trained. Lower `lr`, set `clip_grad` 3.0, or try `amp_dtype` fp32"
        )


def evaluate(state: TrainState, stage: Stage) -> dict[str, float]:
    """The stage's evaluation of the weights, and of their moving average where there is
    one.
    """
    with fsdp.gather_model(state.model) as model:
        test = stage.evaluate(model)
    if state.ema is not None and test:
        device = next(state.model.parameters()).device
        on_device = (
            state.ema.module if state.ema.device is None else copy.deepcopy(state.ema.module).to(device)
        )
        with fsdp.gather_model(on_device) as model:
            averaged = stage.evaluate(model)
        test |= {name.replace("test_", "test_ema_", 1): value for name, value in averaged.items()}
    return test


def current_lr(state: TrainState) -> float:
    """The highest of the groups' rates: the one the schedule gives, before layer-wise
    decay.
    """
    return max(group["lr"] for group in state.optimizer.param_groups)


def accumulate_gradients(
    state: TrainState,
    stage: Stage,
    micro_batches: list[dict[str, Any]],
    run: Run,
    device_transform: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Tensor]:
    """Forward and backward of each micro-batch; the ranks exchange gradients at the
    last one. Means of the logs.

    `device_transform`: what makes of a batch, on the device, what the network takes
    (View).
    """
    # What a step draws (drop path, mixup) depends on the run's seed, the step and the
    # rank alone: a resumed run draws the same.
    seed_all(derive_seed(run.options.seed, "step", state.step, run.launch.rank), run.device)
    logs: dict[str, Tensor] = {}
    for index, batch in enumerate(micro_batches):
        last = index + 1 == len(micro_batches)
        ddp = isinstance(state.runner, DistributedDataParallel)
        no_sync = cast(Any, state.runner).no_sync() if ddp and not last else contextlib.nullcontext()
        with phase(COPY):
            batch = device_transform(to_device(batch, run.device))
        with no_sync:
            with phase(FORWARD), run.precision.autocast():
                loss, parts = stage.step(state.runner, batch)
            # A loss that is not finite makes every gradient NaN, so that all ranks skip
            # the step without having to ask.
            is_finite = torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
            with phase(BACKWARD):
                state.scaler.scale(loss * is_finite / len(micro_batches)).backward()
        for name, value in ({"loss": loss} | parts).items():
            share = value.detach().float() / len(micro_batches)
            logs[name] = logs[name] + share if name in logs else share
    return logs


def take_step(state: TrainState, clip_grad: float | None) -> Tensor:
    """Clip and update; a step whose gradients are not finite leaves weights and
    optimizer as they are. Returns the norm.
    """
    optimizer, scaler = state.optimizer, state.scaler
    scaler.unscale_(optimizer)
    if optimizer.defaults.get("fused") and not scaler.is_enabled():
        gradients = [p.grad for p in state.parameters if p.grad is not None]
        norm = fsdp.gather_full(nn.utils.get_total_norm(gradients))
        # The fused kernels read both on the device: whether to skip the step, and by
        # what to divide the gradients.
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        optimizer.grad_scale = ((norm + 1e-6) / clip_grad).clamp(min=1) if clip_grad else None  # type: ignore[attr-defined]
        optimizer.step()
    else:
        norm = fsdp.gather_full(nn.utils.clip_grad_norm_(state.parameters, clip_grad or math.inf))
        if scaler.is_enabled():
            scaler.step(optimizer)  # skips by itself
        elif bool(torch.isfinite(norm)):  # SGD and timm's optimizers do not skip on the device
            optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm
