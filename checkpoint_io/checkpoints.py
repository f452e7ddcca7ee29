"""Checkpoints: plain tensors and plain data, written atomically, read without running
anything in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch

from checkpoint_io import weight_files
from errors import UserError, hide_secrets
from runtime import distributed, fsdp
from runtime.terminal import log

LATEST = "checkpoint.pth"
BEST = "checkpoint-best.pth"
PART = ".part"  # end of the name of a file that is still being written


def to_plain_data(value: Any) -> Any:
    """Turn flags and the like into data that weights_only loading accepts. URLs lose
    what may be secret.
    """
    if isinstance(value, dict):
        return {str(key): to_plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain_data(item) for item in value]
    return (
        value if isinstance(value, (int, float, bool, type(None), torch.Tensor)) else hide_secrets(str(value))
    )


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Atomic: a temporary file beside it, flushed to the disk, renamed. A reader or a
    crash sees the old file or the new.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        free = 0.0
        with contextlib.suppress(OSError):  # the folder may be gone, or not ours any more
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free / 2**20
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise UserError(
            f"could not write {path} ({reason[:120]}): {count_bytes(content) / 2**20:.1f} MiB needed, "
            f"{free:.1f} MiB free; the previous checkpoint is intact. Make room, or point `output_dir` "
            "elsewhere, and start the same line again"
        ) from None
    sync_folder(path.parent)


class Saver:
    """Writes checkpoints in a thread, from a copy in main memory, while training goes
    on; one at a time.

    An error in the thread reaches the training at its next step (`raise_error`) or
    save, or at the end (`wait`).
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def submit(self, content: dict[str, Any], folder: Path, names: list[str], keep_ckpts: int = 0) -> None:
        """Write under all `names`, names[0] last, and leave only the last `keep_ckpts`
        step checkpoints.

        Rank 0 writes. The others call it too where `content` is sharded.
        """
        self.wait()
        copy = copy_to_cpu(content, keep=distributed.is_main())
        if not distributed.is_main():
            return
        self.thread = threading.Thread(
            target=self._write, args=(copy, folder, names, keep_ckpts), name="checkpoint"
        )
        self.thread.start()

    def _write(self, content: dict[str, Any], folder: Path, names: list[str], keep_ckpts: int) -> None:
        try:
            check_finite(content, folder)
            # The name to go on from is the last: a run killed in between repeats its
            # step and writes all of them again.
            first, *others = reversed(names)
            write_checkpoint(content, folder / first)
            for name in others:
                link_checkpoint(folder / first, folder / name)
            for old in list_step_checkpoints(folder)[keep_ckpts:]:
                old.unlink(missing_ok=True)
        except Exception as error:
            self.error = error

    def raise_error(self) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.raise_error()


def check_finite(content: dict[str, Any], folder: Path) -> None:
    """Refuse to replace a good checkpoint by one whose weights, averages or moments are
    not finite.
    """
    for part in ("model", "model_ema", "optimizer"):
        for name, tensor in named_tensors(content.get(part)):
            if weight_files.count_not_finite(name, tensor):
                good = folder / LATEST
                kept = (
                    f"the last good checkpoint is {good}"
                    if good.exists()
                    else "there is no good checkpoint yet"
                )
                raise UserError(
                    f"{part}.{name} is not finite any more, so this state is not saved: {kept}. Lower `lr`, "
                    "set `clip_grad` 3.0, lengthen `warmup_epochs`, or try `amp_dtype` fp32"
                )


def named_tensors(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dictionaries and lists, with its keys joined by dots."""
    if isinstance(content, torch.Tensor):
        yield name, content
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, (list, tuple))
        else ()
    )
    for key, value in items:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))


def copy_to_cpu(content: Any, keep: bool = True) -> Any:
    """A copy that training cannot change: tensors cloned into main memory, the rest as
    it is.

    Sharded tensors become whole one after the other, on all ranks together; without
    `keep` this rank keeps none of them.
    """
    if isinstance(content, torch.Tensor):
        whole = fsdp.gather_full(content.detach())
        return whole.to("cpu", copy=True) if keep else None
    if isinstance(content, dict):
        return {key: copy_to_cpu(value, keep) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(copy_to_cpu(value, keep) for value in content)
    return content


def format_step_name(step: int) -> str:
    return f"checkpoint-step{step}.pth"


def list_step_checkpoints(folder: Path) -> list[Path]:
    """The step checkpoints in a run's folder, newest first."""
    return sorted(
        folder.glob("checkpoint-step*.pth"),
        key=lambda path: int(path.stem[len("checkpoint-step") :]),
        reverse=True,
    )


def remove_leftovers(folder: Path) -> None:
    """Remove files that a killed run was still writing: they are incomplete and never
    read.
    """
    for path in folder.glob(f".checkpoint*{PART}"):
        path.unlink(missing_ok=True)


def count_bytes(content: Any) -> int:
    """Bytes of the tensors in nested dictionaries and lists."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(content))


def sync_folder(folder: Path) -> None:
    """Make a rename durable; not every file system offers it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link_checkpoint(path: Path, other: Path) -> None:
    """Give a checkpoint a second name without writing it twice. Checkpoints are only
    ever replaced, never changed.
    """
    temporary = other.with_name(f".{other.name}.{os.getpid()}{PART}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
        os.replace(temporary, other)
    except OSError:  # no hard links here
        shutil.copyfile(path, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, other)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint, or a published weight file, which gives `model` and
    what `read_header` finds.
    """
    content = weight_files.load_file(path)
    weights = weight_files.extract_weights(content, str(path))
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        if isinstance(content.get("model_ema"), dict):
            weight_files.extract_weights(content["model_ema"], f"{path} (model_ema)")
        return content | {"args": weight_files.flags_to_dict(content.get("args"))}
    return {"model": weights, **read_header(path)}


def read_header(path: Path) -> dict[str, Any]:
    """Plain data that export_checkpoint put into the head of a safetensors file, which
    has no other place for it: `args` and `stage`; {} for other files.
    """
    if not weight_files.is_safetensors(path):
        return {}
    with safetensors.safe_open(path, "pt") as file:
        texts = file.metadata() or {}
    try:
        return {
            key: json.loads(texts[key]) for key in ("args", "stage") if texts.get(key, "").startswith("{")
        }
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its head is no JSON ({type(error).__name__}); get the file again") from None


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load all weights, strictly: a resumed model must be the one that was saved."""
    own = model.state_dict()
    strange = [key for key, value in weights.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise UserError(f"{path}: {strange[0]} is not a tensor among the weights; take another checkpoint")
    for key in own.keys() & weights.keys():  # load_state_dict would round, or make numbers of switches
        if weights[key].is_floating_point() != own[key].is_floating_point():
            raise UserError(
                f"{path}: {key} is of {weights[key].dtype}, where {own[key].dtype} is needed; take another "
                "checkpoint"
            )
    try:
        model.load_state_dict(fsdp.shard_weights(weights, model))
    except RuntimeError:
        different = [key for key in own if key not in weights or weights[key].shape != own[key].shape]
        different += [key for key in weights if key not in own]
        raise UserError(
            f"{path} is {weight_files.describe_kind(weights)} of another shape than this run's model "
            f"({different[0]} differs): give the flags it was trained with, start from it with `finetune`, "
            "or name another `output_dir`"
        ) from None
    if distributed.is_main():
        log.info(f"weights from {path}")


def write_text(folder: str | Path, name: str, text: str) -> Path:
    """Write a small result file, on rank 0."""
    path = Path(folder) / name
    if distributed.is_main():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path} could not be written ({error.strerror}): make room, or name another folder"
            ) from None
    return path


def write_json(folder: str | Path, name: str, content: Any) -> Path:
    return write_text(folder, name, json.dumps(to_plain_data(content), indent=1) + "\n")
