"""What is in a weight file, read without running any code in it: safetensors, torch.save (new or old), TorchScript."""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch

from errors import UserError


def _harmless_globals() -> list[Any]:
    """What checkpoints hold besides tensors: flags, paths, numpy scalars and arrays under numpy 1's and 2's names."""
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    names = [(f, f"{module}.{f.__name__}") for module in modules for f in (scalar, reconstruct)]
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"}
    paths = [(pathlib.PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]
    return [argparse.Namespace, np.ndarray, np.dtype, *names, *sorted(dtypes, key=str), *paths]


def load_file(path: str | os.PathLike[str], safe: Sequence[Any] = ()) -> Any:
    """What a weight file holds, on the CPU: safetensors, torch.save (new or old), TorchScript (its state dict).

    Python code pickled into a file is never run. `safe`: more globals a torch file may name, as
    `torch.serialization.safe_globals` takes them. UserError: not there, damaged, no weight file, or with code in it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        members: list[str] = []
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, but OpenAI's CLIP is a TorchScript archive
            if any(name.endswith("/constants.pkl") or "/code/" in name for name in members):
                return torch.jit.load(path, map_location="cpu").state_dict()
            # Only who expects a module (`safe`) needs the rewriting; it costs a copy of the file in memory.
            source = path if members or not safe else _with_classes_called(path)
            called = (_class_alone, f"{__name__}.{_class_alone.__name__}")
            with torch.serialization.safe_globals([*_harmless_globals(), called, *safe]):
                return torch.load(source, map_location="cpu", weights_only=True, mmap=True if members else None)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; change its permissions") from error
    except Exception as error:  # a damaged file may fail in any way
        raise _unreadable(path, error) from error


def _class_alone(kind: str, cls: Any, file: str | None, source: str | None) -> Any:
    """The class in an old-format file's note about one: ("module", class, its source file, its source)."""
    return cls


def _with_classes_called(path: pathlib.Path) -> io.BytesIO:
    """An old-format file that torch can read with weights_only=True although a module was pickled in it.

    torch gives every module class the persistent id ("module", class, file, source) in this format, and refuses any such
    id when it may not run code, whatever globals are safe. Here each becomes the call `_class_alone("module", ...)`, of the
    same value: so torch's own rule decides about every class, as it does in the new format. Nothing is run here.
    """
    data = path.read_bytes()
    with io.BytesIO(data) as file:
        for _ in range(3):  # a magic number, the version, sizes of the writer's types; the fourth pickle is the content
            list(pickletools.genops(file))
        steps = list(pickletools.genops(file))
    texts: dict[Any, Any] = {}  # memo slot -> the string in it: "module" is written once, then taken from the memo
    pieces, end, mark = [], 0, 0
    for i, (code, argument, position) in enumerate(steps):
        if code.name == "MARK":
            mark = i
        elif "PUT" in code.name and steps[i - 1][0].name == "BINUNICODE":
            texts[argument] = steps[i - 1][1]
        elif code.name == "BINPERSID":  # of the tuple that began at the last mark
            first, kind, _ = steps[mark + 1]
            if (texts.get(kind) if "GET" in first.name else kind) == "module":
                start = steps[mark][2] or 0
                pieces += [data[end:start], f"c{__name__}\n{_class_alone.__name__}\n".encode(), data[start:position], b"R"]
                end = (position or 0) + 1
    return io.BytesIO(b"".join([*pieces, data[end:]]))


def _unreadable(path: pathlib.Path, error: Exception) -> UserError:
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return UserError(
            f"{path} holds Python objects ({code.group(1)}), which are not loaded because they can run any code; if "
            "you trust the file, keep only its tensors: "
            f"torch.save(torch.load('{path}', weights_only=False)['model'], 'clean.pth')"
        )
    why = (str(error).strip().splitlines() or [""])[0][:100]
    return UserError(
        f"{path} is no weight file or an incomplete one ({type(error).__name__}: {why}); delete it and get it again"
    )


def load_state_dict(path: str | os.PathLike[str], keys: str = "model|module") -> dict[str, torch.Tensor]:
    """The tensors in a file under the first of `keys` that it has, else `state_dict`, else its top."""
    return weights_in(load_file(path), str(path), keys)


def plain_flags(args: Any) -> dict[str, Any]:
    """The flags in a checkpoint: a dictionary, the argparse Namespace of published files, or {}."""
    return dict(args) if isinstance(args, Mapping) else vars(args) if isinstance(args, argparse.Namespace) else {}


def weights_in(content: Any, source: str, keys: str = "model|module") -> dict[str, torch.Tensor]:
    """As load_state_dict, of a file that is read already; `source` is for the message."""
    found = content
    if isinstance(content, Mapping):
        inside = [key for key in (*keys.split("|"), "state_dict") if isinstance(content.get(key), Mapping)]
        found = content[inside[0]] if inside else content
    tensors = {k: v for k, v in found.items() if isinstance(v, torch.Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        holds = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"{source} holds no weights under {keys}|state_dict nor at its top; it holds: {holds or 'nothing'}")
    return tensors


KINDS = {  # a key that only this kind of file has -> what it is, and what it is for
    "quantize.embedding.weight": "a VQ-KD tokenizer (for --tokenizer_weight of pretraining)",
    "tokenizer.quantize.embedding.weight": "a pixel decoder (for visualize_reconstruction.py)",
    "heads.0.weight": "a linear probe (of run_linear_eval.py)",
    "blocks.input.w": "DALL-E's encoder (for --tokenizer_weight with --tokenizer_model dall-e)",
    "decode_head.conv_seg.weight": "a segmentation model",
    "lm_head.weight": "a model of masked image modelling (for --finetune)",
    "head.weight": "a classifier (for --finetune, or --eval --resume)",
    "blocks.0.norm1.weight": "a vision transformer without a head",
}


def kind_of(keys: Iterable[str]) -> str:
    """What a file with these keys is, in words with an article."""
    present = set(keys)
    found = next((what for key, what in KINDS.items() if key in present), None)
    names = sorted(present)
    return found or f"no file of ours (it holds {', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
