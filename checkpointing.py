"""Checkpoints: plain tensors and plain data, written atomically, read without running anything in them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

import distributed
import model_zoo
from distributed import log
from errors import UserError

LATEST = "checkpoint.pth"
BEST = "checkpoint-best.pth"


def plain(value: Any) -> Any:
    """Flags and the like as data that weights_only loading accepts."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None), torch.Tensor)) else str(value)


def write(content: dict[str, Any], path: Path) -> None:
    """Atomic: a temporary file beside it, flushed to the disk, renamed. A reader or a crash sees the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        free = shutil.disk_usage(path.parent).free / 2**20
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise UserError(
            f"could not write {path} ({reason[:120]}): {size_of(content) / 2**20:.0f} MiB needed, {free:.0f} MiB free; "
            "the previous checkpoint is intact"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def size_of(content: Any) -> int:
    """Bytes of the tensors in nested dictionaries and lists."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    items = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return sum(size_of(item) for item in items)


def sync_folder(folder: Path) -> None:
    """Make a rename durable; not every file system offers it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def also_as(path: Path, other: Path) -> None:
    """The same checkpoint under a second name, without writing it twice; checkpoints are only ever replaced, never changed."""
    temporary = other.with_name(f".{other.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
        os.replace(temporary, other)
    except OSError:  # no hard links here
        write(torch.load(path, map_location="cpu", weights_only=True), other)


def find(resume: str, auto_resume: bool, output_dir: str) -> Path | None:
    """The checkpoint that a run goes on from: --resume, else output_dir/checkpoint.pth if --auto_resume."""
    if resume:
        return model_zoo.fetch(resume)
    latest = Path(output_dir) / LATEST if output_dir else None
    return latest if auto_resume and latest is not None and latest.exists() else None


def read(path: Path) -> dict[str, Any]:
    """A training checkpoint, or a published weight file (then only `model` is in it)."""
    content = model_zoo.load_file(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        return content | {"args": model_zoo.plain_flags(content.get("args"))}
    return {"model": model_zoo.load_state_dict(str(path))}


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Strict: a resumed model must be the one that was saved."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path} holds another model than --model and the flags around it describe: {first[:300]}") from None
    if distributed.is_main():
        log.info(f"weights from {path}")


def write_text(folder: str | Path, name: str, text: str) -> Path:
    """A small result file, on rank 0."""
    path = Path(folder) / name
    if distributed.is_main():
        path.write_text(text, encoding="utf-8")
    return path


def write_json(folder: str | Path, name: str, content: Any) -> Path:
    return write_text(folder, name, json.dumps(content, indent=1) + "\n")
