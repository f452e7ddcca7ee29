"""The one training loop. A stage says what a step computes; how a step is taken is written here, once.

Precision, accumulation, clipping, schedule, the check for non-finite steps, moving
averages, progress, log.txt, TensorBoard, pictures and checkpoints are the same for
every stage.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint_io import checkpoints
from data_pipeline.files import BadFiles, SampleDataset
from data_pipeline.samplers import Loader, close
from errors import UserError
from optim_factory import Schedule
from run_state import Run, Stage, TrainingData, TrainState, save
from runtime import distributed, fsdp
from runtime.device import to_device
from runtime.distributed import Precision, log
from runtime.metrics import Reporter, RunningMeans, clock
from runtime.signals import StopSignal
from utils import derive_seed, seed_all

BAD_STEPS_TO_GIVE_UP = 10
LEAST_LOSS_SCALE = 2.0**-10


class Stopped(Exception):
    """The run was asked to stop, and its state is saved."""


def fit(state: TrainState, stage: Stage, data: TrainingData, schedule: Schedule, run: Run) -> None:
    """Train from where `state` stands to the last epoch, or until a signal asks to stop; both are a success."""
    epochs = run.args.epochs if not schedule.in_steps else epochs_of_steps(state, data, len(schedule.lr))
    first_step = state.step
    distributed.end_set_up()
    with contextlib.ExitStack() as at_the_end:
        if run.lock is not None:
            at_the_end.callback(run.lock.release)
        at_the_end.enter_context(explain_errors(run))
        reporter = Reporter(run.args, run.device, epochs, state.epoch, state.step)
        try:
            with StopSignal() as stop:
                train_epochs(state, stage, data, schedule, run, reporter, stop)
                stop.settle()
            refuse_a_run_without_a_step(state, first_step)
            log.info(f"finished epoch {epochs} in {clock(time.monotonic() - run.started)}")
        except Stopped as stopped:
            log.info(
                f"stopped by {stopped} after step {state.step}: the same command line goes on from there"
            )
        finally:
            close(data.loader)
            try:
                run.saver.wait()
            finally:
                reporter.close()
    distributed.barrier()


@contextlib.contextmanager
def explain_errors(run: Run) -> Iterator[None]:
    """What befalls the machine while training, in one sentence: memory, other processes, the disk."""
    before = threading.excepthook

    def without_the_disk(thread: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread hands its error on to who writes next, and so here: no need
        for a traceback of its own.
        """
        if not (
            isinstance(thread.exc_value, OSError) and type(thread.thread).__module__.startswith("tensorboard")
        ):
            before(thread)

    threading.excepthook = without_the_disk
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            "out of GPU memory: halve --batch_size and double --update_freq, which is the same step"
        ) from None
    except RuntimeError as error:
        raise distributed.explained(error) from None
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        folders = [folder for folder in (run.args.output_dir, run.args.log_dir) if folder]
        ours = bool(name) and any(name.startswith(folder) for folder in folders)
        if not ours and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        raise UserError(
            f"{name or 'a file of ' + ' or '.join(folders)} could not be written ({error.strerror}): "
            "the checkpoints "
            "saved before are intact. Make room, or point --output_dir elsewhere, and start the same "
            "line again"
        ) from None
    finally:
        threading.excepthook = before


def epochs_of_steps(state: TrainState, data: TrainingData, max_steps: int) -> int:
    """How many epochs a run of so many steps has, done ones included; the last may be cut."""
    into_epoch = state.samples // data.sampler.global_batch
    return state.epoch + math.ceil((into_epoch + max_steps - state.step) / data.steps_per_epoch)


def train_epochs(
    state: TrainState,
    stage: Stage,
    data: TrainingData,
    schedule: Schedule,
    run: Run,
    reporter: Reporter,
    stop: StopSignal,
) -> None:
    """One line of log.txt, and a checkpoint, an epoch."""
    args, bad_files, epochs = run.args, BadFiles(), reporter.epochs
    for epoch in range(state.epoch, epochs):
        bad_files.start_epoch(data.steps_per_epoch * args.update_freq * data.sampler.batch_size)
        train = train_one_epoch(state, stage, data, schedule, run, reporter, bad_files, stop)
        train |= stage.end_epoch()
        state.epoch, state.samples = epoch + 1, 0
        run.saver.wait()  # evaluation starts data processes: no other thread may run while they are forked
        test = evaluate(state, stage) if due(epoch, args.eval_freq, epochs) else {}
        with fsdp.whole(state.model) as model:
            test |= stage.probe(model, epoch)
        score = stage.better(test)
        # The line in log.txt first: a run killed between the two repeats the epoch, and
        # then replaces the line.
        reporter.epoch(epoch, train, test)
        names = [checkpoints.LATEST]
        if due(epoch, args.save_ckpt_freq, epochs):
            names.append(f"checkpoint-{epoch}.pth")
        if score is not None and score > state.best and math.isfinite(test.get("test_loss", 0.0)):
            state.best = score
            names.append(checkpoints.BEST)
        save(state, stage, run, epoch, names)
        if args.image_freq and (epoch == 0 or due(epoch, args.image_freq, epochs)):
            with fsdp.whole(state.model) as model:
                if reporter.shows_pictures:
                    reporter.pictures(epoch, stage.pictures(model))


def refuse_a_run_without_a_step(state: TrainState, first_step: int) -> None:
    """A run that skipped each of its steps has trained nothing, which is no success."""
    steps = state.step - first_step
    if steps and state.bad_in_a_row >= steps:
        raise UserError(
            f"each of the {steps} steps of this run had a loss or gradient that is not finite, so "
            "nothing was trained. Lower "
            "--lr, set --clip_grad 3.0, or try --amp_dtype fp32"
        )


def due(epoch: int, every: int, epochs: int) -> bool:
    """Every so many epochs, and after the last."""
    return (epoch + 1) % every == 0 or epoch + 1 == epochs


def evaluate(state: TrainState, stage: Stage) -> dict[str, float]:
    """The stage's evaluation of the weights, and of their moving average where there is one."""
    with fsdp.whole(state.model) as model:
        test = stage.evaluate(model)
    if state.ema is not None and test:
        device = next(state.model.parameters()).device
        on_device = (
            state.ema.module if state.ema.device is None else copy.deepcopy(state.ema.module).to(device)
        )
        with fsdp.whole(on_device) as model:
            averaged = stage.evaluate(model)
        test |= {name.replace("test_", "test_ema_", 1): value for name, value in averaged.items()}
    return test


def train_one_epoch(
    state: TrainState,
    stage: Stage,
    data: TrainingData,
    schedule: Schedule,
    run: Run,
    reporter: Reporter,
    bad_files: BadFiles,
    stop: StopSignal,
) -> dict[str, float]:
    """The rest of the epoch in which `state` stands; returns the epoch's means over all ranks."""
    args = run.args
    state.runner.train()
    if state.samples == 0:
        state.means = RunningMeans()
        stage.start_epoch(state.epoch)
    data.sampler.set_position(state.epoch, state.samples)
    watch = BadSteps(state, run)
    done = data.steps_per_epoch - len(data.sampler) // args.update_freq
    start = state.step if schedule.in_steps else state.epoch * data.steps_per_epoch + done
    steps = min(data.steps_per_epoch, done + len(schedule.lr) - start)
    if done >= steps:  # killed behind the last step of an epoch: what log.txt will tell of it
        schedule.apply(state.optimizer, max(start - 1, 0))
    reporter.start_epoch(state.epoch, steps, state.step)
    batches = iter(data.loader)
    for step_in_epoch in range(done, steps):
        schedule_step = start + step_in_epoch - done
        schedule.apply(state.optimizer, schedule_step)
        stage.before_step(state.step)
        micro_batches = reporter.waiting_for(batches, args.update_freq)
        for batch in micro_batches:
            bad_files.add(batch["failed"], found_image="image" in batch)
        logs = accumulate_gradients(state, stage, micro_batches, run, data.loader.dataset.device_transform)
        norm = take_step(state, args.clip_grad)
        watch.add(logs["loss"], norm, micro_batches)
        state.means.add(logs | {"grad_norm": norm})
        state.step += 1
        state.samples += data.sampler.global_batch
        if state.ema is not None:
            state.ema.update(state.model, state.step)
        if state.step % args.print_freq == 0 or step_in_epoch + 1 == steps:
            watch.check()
            left = len(schedule.lr) - schedule_step - 1
            reporter.step(
                state.means.read(),
                current_lr(state),
                state.step,
                step_in_epoch,
                data.sampler.global_batch,
                left,
            )
        if args.save_ckpt_steps and state.step % args.save_ckpt_steps == 0:
            watch.check()
            more = [checkpoints.step_name(state.step)] if args.keep_ckpts > 0 else []
            save(state, stage, run, state.epoch, [checkpoints.LATEST, *more])
        if stop.agreed():
            watch.check()
            save(state, stage, run, state.epoch, [checkpoints.LATEST])
            raise Stopped(stop.received or "a signal to another process")
        run.saver.raise_error()
    now = {"lr": current_lr(state)}
    if state.scaler.is_enabled():
        now["loss_scale"] = state.scaler.get_scale()
    return state.means.read(over_all_ranks=True) | now


def current_lr(state: TrainState) -> float:
    """The highest of the groups' rates: the one the schedule gives, before layer-wise decay."""
    return max(group["lr"] for group in state.optimizer.param_groups)


def accumulate_gradients(
    state: TrainState,
    stage: Stage,
    micro_batches: list[dict[str, Any]],
    run: Run,
    device_transform: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Tensor]:
    """Forward and backward of each micro-batch; the ranks exchange gradients at the last one. Means of the logs.

    `device_transform`: what makes of a batch, on the device, what the network takes (View).
    """
    # What a step draws (drop path, mixup) depends on the run's seed, the step and the
    # rank alone: a resumed run draws the same.
    seed_all(derive_seed(run.args.seed, "step", state.step, run.launch.rank), run.device)
    logs: dict[str, Tensor] = {}
    for index, batch in enumerate(micro_batches):
        last = index + 1 == len(micro_batches)
        ddp = isinstance(state.runner, DistributedDataParallel)
        quiet = cast(Any, state.runner).no_sync() if ddp and not last else contextlib.nullcontext()
        batch = device_transform(to_device(batch, run.device))
        with quiet:
            with run.precision.autocast():
                loss, parts = stage.step(state.runner, batch)
            # A loss that is not finite makes every gradient NaN, so that all ranks skip
            # the step without having to ask.
            sound = torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
            state.scaler.scale(loss * sound / len(micro_batches)).backward()
        for name, value in ({"loss": loss} | parts).items():
            share = value.detach().float() / len(micro_batches)
            logs[name] = logs[name] + share if name in logs else share
    return logs


def evaluation_batches(
    loader: Loader, device: torch.device, flag: str = "--eval_data_path"
) -> Iterator[dict[str, Any]]:
    """Batches on the device; files that do not decode are left out, named and counted, and
    too many of them end the run, as in training. To be read to the end by all ranks:
    there they tell each other what was left out.

    `flag` names the images' folder in messages.
    """
    bad_files = BadFiles(flag=flag, instead="left out")
    bad_files.start_epoch(len(loader.dataset))
    read = 0
    for batch in loader:
        bad_files.add(batch["failed"])
        if "image" in batch:
            read += len(batch["image"])
            yield loader.dataset.device_transform(to_device(batch, device))
    found = distributed.gather_objects((read, list(bad_files.failed)))
    read, left_out = sum(count for count, _ in found), [name for _, names in found for name in names]
    if left_out:
        bad_files.add(left_out, found_image=read > 0)
        named = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        log.warning(
            f"warning: {len(left_out)} of {read + len(left_out)} images of {flag} cannot be read and "
            f"do not count: {named}"
        )


def mean_of_steps(
    stage: Stage,
    model: nn.Module,
    batches: Iterator[dict[str, Any]],
    precision: Precision,
    weight: Callable[[dict[str, Any]], float],
) -> dict[str, float]:
    """What the stage's own step reports, over held-out batches of all ranks; `weight`: of a batch in the mean."""
    model.eval()
    means = RunningMeans()
    for batch in batches:
        with precision.autocast():
            loss, logs = stage.step(model, batch)
        means.add({"loss": loss} | logs, weight=weight(batch))
    return {f"test_{name}": value for name, value in means.read(over_all_ranks=True).items()}


def samples_to_show(dataset: SampleDataset, count: int) -> list[dict[str, Any]]:
    """`count` samples spread over the data set, always the same ones, for pictures and
    statistics: their tensors, as the network takes them.
    """
    count = min(count, len(dataset))
    shown = []
    for sample in (dataset[index * len(dataset) // count] for index in range(count)):
        if "image" in sample:
            batch = {name: value[None] for name, value in sample.items() if isinstance(value, Tensor)}
            shown.append({name: value[0] for name, value in dataset.device_transform(batch).items()})
    return shown


def take_step(state: TrainState, clip_grad: float | None) -> Tensor:
    """Clip and update; a step whose gradients are not finite leaves weights and optimizer
    as they are. Returns the norm.
    """
    optimizer, scaler = state.optimizer, state.scaler
    scaler.unscale_(optimizer)
    if optimizer.defaults.get("fused") and not scaler.is_enabled() and not fsdp.is_sharded(state.model):
        norm = nn.utils.get_total_norm([p.grad for p in state.parameters if p.grad is not None])
        # Read by the fused kernels, which skip the step or divide the gradients while they read them.
        skips, divisor = (
            (~torch.isfinite(norm)).float(),
            ((norm + 1e-6) / clip_grad).clamp(min=1) if clip_grad else None,
        )
        optimizer.found_inf, optimizer.grad_scale = skips, divisor  # type: ignore[attr-defined]
        optimizer.step()
    else:
        norm = fsdp.full(nn.utils.clip_grad_norm_(state.parameters, clip_grad or math.inf))
        if scaler.is_enabled():
            scaler.step(optimizer)  # skips by itself
        elif bool(torch.isfinite(norm)):  # SGD, timm's optimizers and sharded ones do not skip on the device
            optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


class BadSteps:
    """Names the steps that were skipped because loss or gradient was not finite, and gives
    up after ten in a row.

    The flags stay on the device until `check`, which reads them all at once.
    """

    def __init__(self, state: TrainState, run: Run) -> None:
        self.state, self.run = state, run
        self.pending: list[tuple[int, Tensor]] = []
        self.last_batches: list[dict[str, Any]] = []

    def add(self, loss: Tensor, norm: Tensor, micro_batches: list[dict[str, Any]]) -> None:
        self.last_batches = micro_batches
        # With a gradient scaler an overflowing gradient is part of the search for the
        # scale; only the loss counts.
        value = loss if self.state.scaler.is_enabled() else norm + loss
        self.pending.append((self.state.step, ~torch.isfinite(value)))

    def check(self) -> None:
        if not self.pending:
            return
        flags = torch.stack([flag for _, flag in self.pending]).float()
        distributed.all_reduce_sum(flags)  # all ranks check at the same steps, and must judge alike
        for (step, _), bad in zip(self.pending, flags.tolist(), strict=True):
            self.state.bad_in_a_row = self.state.bad_in_a_row + 1 if bad else 0
            if bad:
                log.warning(f"warning: step {step} was skipped: its loss or gradient is not finite")
            if self.state.bad_in_a_row >= BAD_STEPS_TO_GIVE_UP:
                self.give_up(step)
        self.pending.clear()
        if self.state.scaler.is_enabled() and self.state.scaler.get_scale() < LEAST_LOSS_SCALE:
            raise UserError(
                "the gradients are not finite in fp16 however small the loss is scaled; the last "
                "step that counted is in the "
                "checkpoint. Lower --lr, set --clip_grad 3.0, or try --amp_dtype fp32"
            )

    def give_up(self, step: int) -> None:
        """End the run; the last good state is in the checkpoint, and beside it what is
        needed to look at the batch.
        """
        kept = "there is no --output_dir, so nothing was kept"
        if self.run.output_dir:
            state = {"epoch": self.state.epoch, "step": step, "seed": self.run.args.seed}
            batches = [describe_batch(batch) for batch in self.last_batches]
            path = self.run.output_dir / f"bad_batch-rank{self.run.launch.rank}.json"
            path.write_text(json.dumps(state | {"last_micro_batches": batches}, indent=1) + "\n")
            good = self.run.output_dir / checkpoints.LATEST
            kept = f"the last good checkpoint is {good}, the last batch is described in {path}"
        raise UserError(
            f"{BAD_STEPS_TO_GIVE_UP} steps in a row, up to step {step}, had a loss or gradient that "
            "is not finite; they "
            f"changed nothing: {kept}. Lower --lr, set --clip_grad 3.0, lengthen --warmup_epochs, or "
            "try --amp_dtype fp32"
        )


def describe_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Which samples these are (dataset[epoch, index] gives them again), and statistics of each tensor."""
    described: dict[str, Any] = {"indices": batch["index"].tolist()}
    for name, value in batch.items():
        if isinstance(value, Tensor) and name != "index":
            x = value.detach().float()
            finite = bool(torch.isfinite(x).all())
            numbers = (
                {"min": float(x.min()), "max": float(x.max()), "mean": float(x.mean())} if finite else {}
            )
            described[name] = {"shape": list(value.shape), "finite": finite, **numbers}
    return described
