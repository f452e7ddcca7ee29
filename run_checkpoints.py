"""A run's checkpoints: writing them, and going on from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from checkpoint_io import checkpoints, downloads, resumption
from checkpoint_io.training_state import TrainState, build_checkpoint, load_optimizer, load_progress
from errors import UserError
from run_state import Run
from runtime import distributed
from runtime.terminal import log


class Stateful(Protocol):
    """What a stage must have to be saved and resumed (engine.Stage)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


def save(state: TrainState, stage: Stateful, run: Run, epoch: int, names: list[str]) -> None:
    """Write a checkpoint on rank 0 under each of `names`, in the background.

    `state` holds the position to resume from, `epoch` labels the checkpoint. All ranks
    call it: they gather what is sharded, and their shares of the statistics.
    """
    output_dir = run.output_dir
    if output_dir is None or not run.options.save_ckpt:
        return
    means, stage_state = list(distributed.gather_objects(state.means.state_dict())), stage.state_dict()
    if not (distributed.is_main() or run.is_sharded):
        return
    if not output_dir.is_dir():
        raise UserError(
            f"`output_dir` {output_dir} was removed while the run was writing to it: start the same line "
            "again"
        )
    content = build_checkpoint(state, epoch, means) | {
        "args": run.flags,
        "data": dict(run.data),
        "stage": stage_state,
        "world_size": run.launch.world_size,
    }
    run.saver.submit(content, output_dir, names, run.options.keep_ckpts)


def find_resumed(run: Run) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that the run goes on from and what is in it: None and {} where
    there is none. It is read once, and kept until `resume`.
    """
    if run.resumed is None:
        options = run.options
        path = resumption.find_checkpoint(options.resume, options.auto_resume, options.output_dir)
        run.resumed = (path, {} if path is None else checkpoints.read_checkpoint(path))
    return run.resumed


def resume(state: TrainState, stage: Stateful, run: Run, steps_per_epoch: int) -> None:
    """Go on from `resume`, or from output_dir/checkpoint.pth, if there is one; all
    ranks from the same position.
    """
    options = run.options
    path, content = find_resumed(run)
    run.resumed = None
    if path is not None:
        restore(state, stage, run, path, steps_per_epoch, content=content)
        if options.cooldown_from and state.cooldown_start is None:
            raise UserError(
                f"`output_dir` {options.output_dir} holds a run that is not cooling down: name another "
                "folder for the one of `cooldown_from`"
            )
    elif options.cooldown_from:
        path = downloads.fetch(options.cooldown_from)
        restore(state, stage, run, path, steps_per_epoch, cools_down=True)
    positions = distributed.gather_objects(state.position)
    if len(set(positions)) > 1:
        raise UserError(
            "the processes would start at different places (epoch, samples, step): "
            f"{sorted(set(positions))}; `output_dir` must be one folder that all machines see"
        )


def restore(
    state: TrainState,
    stage: Stateful,
    run: Run,
    path: Path,
    steps_per_epoch: int,
    cools_down: bool = False,
    content: dict[str, Any] | None = None,
) -> None:
    """Undo `save`. Optimizer settings (betas, layer decay, ...) are this run's flags,
    its moments are the checkpoint's. `cools_down`: it must be of a constant learning
    rate. `content`: of the file, where it has been read already.
    """
    content = checkpoints.read_checkpoint(path) if content is None else content
    if cools_down:
        resumption.check_can_cool_down(content, path)
    resumption.check_same_run(content, run.flags, run.data, path)
    with resumption.naming_changed_flags(content, run.flags, path):
        checkpoints.load_weights(state.model, content["model"], path)
        if state.ema is not None:
            checkpoints.load_weights(state.ema.module, content.get("model_ema", content["model"]), path)
    if "next" not in content and run.output_dir and distributed.is_main():
        resumption.keep_published(path, run.output_dir)
    if resumption.is_published(content):
        content = resumption.convert_published(content, steps_per_epoch, run.launch.world_size)
    if "optimizer" not in content or "next" not in content:
        log.info(f"{path} holds only weights: training starts at epoch {state.epoch}")
        return
    opt = run.options.opt
    before = content.get("args", {}).get("opt", opt)
    if before != opt:
        raise UserError(f"{path} holds the state of `opt` {before}, not of {opt}: go on with `opt` {before}")
    with resumption.naming_changed_flags(content, run.flags, path):
        load_optimizer(state, content["optimizer"], path)
    try:
        load_progress(state, content, run.device)
        if content["stage"] is not None:
            stage.load_state_dict(content["stage"])
        world_size = int(content["world_size"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a complete training checkpoint of this code ({type(error).__name__}: {error}): "
            "take another one, or start from its weights with `finetune`"
        ) from None
    log.info(f"resumed    {path}: epoch {state.epoch}, {state.samples} samples into it, step {state.step}")
    if world_size != run.launch.world_size:
        log.warning(
            f"warning: the checkpoint comes from {world_size} processes, now there are "
            f"{run.launch.world_size}: the run goes on from the same sample, but no longer bit for bit"
        )
