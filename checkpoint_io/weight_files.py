"""What is in a weight file, read without running any code in it: safetensors,
torch.save (new or old), TorchScript.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import safetensors.torch
import torch

from checkpoint_io import torch_files
from checkpoint_io.pickle_builders import CodeInFile, DamagedFile, UnsupportedFile
from errors import UserError
from runtime.terminal import say_if_slow


def load_file(path: str | os.PathLike[str], objects: Collection[str] = ()) -> Any:
    """The content of a weight file, on the CPU.

    Nothing in a file is ever run, and checksums are compared.

    Args:
        path: A file of safetensors, of torch.save (also before torch 1.6) or of
            torch.jit.save, which gives its state dict.
        objects: Names of classes (module.name) whose instances are read as
            `pickle_builders.PickledObject`.

    Raises:
        UserError: The file is missing, damaged, no weight file, or holds code.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        why = "is not a regular file" if path.exists() else "there is no such file"
        raise UserError(f"{path}: {why}")
    try:
        with say_if_slow(f"reading    {path}"):
            if is_safetensors(path):
                return safetensors.torch.load_file(path)
            return torch_files.load(path, objects)
    except CodeInFile as error:
        raise UserError(
            f"{path} holds Python objects ({error.name}), which are not loaded because they can run any "
            f"code; if you trust the file, keep only its tensors: torch.save(torch.load('{path}', "
            "weights_only=False)['model'], 'clean.pth')"
        ) from None
    except DamagedFile as error:
        raise _make_unreadable_error(path, str(error)) from None
    except UnsupportedFile as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}{suggest_permissions(error)}") from error
    except Exception as error:  # a damaged safetensors file
        why = (str(error).strip().splitlines() or [""])[0][:100]
        raise _make_unreadable_error(path, f"{type(error).__name__}: {why}") from error


def is_safetensors(path: pathlib.Path) -> bool:
    """By content: eight bytes with the length of a header in JSON, then the header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def suggest_permissions(error: OSError) -> str:
    return "; change its permissions" if isinstance(error, PermissionError) else ""


def _make_unreadable_error(path: pathlib.Path, why: str) -> UserError:
    return UserError(f"{path} is not a weight file, or is incomplete ({why}); delete it and get it again")


def load_state_dict(path: str | os.PathLike[str], keys: str = "model|module") -> dict[str, torch.Tensor]:
    """The tensors in a file under the first of `keys` that it has, else `state_dict`,
    else its top.
    """
    return extract_weights(load_file(path), str(path), keys)


def flags_to_dict(args: Any) -> dict[str, Any]:
    """The flags in a checkpoint: a dictionary, the argparse Namespace of published
    files, or {}.
    """
    return (
        dict(args)
        if isinstance(args, Mapping)
        else vars(args)
        if isinstance(args, argparse.Namespace)
        else {}
    )


def extract_weights(content: Any, source: str, keys: str = "model|module") -> dict[str, torch.Tensor]:
    """As load_state_dict, of a file that is read already; `source` is for the
    message.
    """
    found, inside = content, []
    if isinstance(content, Mapping):
        inside = [key for key in (*keys.split("|"), "state_dict") if isinstance(content.get(key), Mapping)]
        found = content[inside[0]] if inside else content
    if isinstance(found, Mapping):
        check_all_tensors(found, source, beside_others=not inside)
    tensors = (
        {k: v for k, v in found.items() if isinstance(v, torch.Tensor)} if isinstance(found, Mapping) else {}
    )
    if not tensors:
        holds = (
            ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        )
        raise UserError(
            f"{source} holds no weights under {keys}|state_dict nor at its top; it holds: "
            f"{holds or 'nothing'}"
        )
    for key, tensor in tensors.items():
        check_weight(key, tensor, source)
    return tensors


def check_all_tensors(state: Mapping[Any, Any], source: str, beside_others: bool) -> None:
    """UserError: a weight that is not a tensor. `beside_others`: plain entries such as
    epoch may lie beside the weights.
    """
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) and (not beside_others or "." in str(key)):
            raise UserError(
                f"{source}: {key} is not a tensor but of type {type(value).__name__}, so the file is "
                "damaged or no weight file; remove that entry if the weight is not needed, or get the file "
                "again"
            )


def check_weight(key: Any, tensor: torch.Tensor, source: str) -> None:
    """UserError: no weight of a network."""
    if not isinstance(key, str):
        raise UserError(f"{source} holds a tensor under {key!r} instead of a name")
    if tensor.is_complex():
        raise UserError(
            f"{source}: {key} holds complex numbers ({tensor.dtype}), which no weight of a network is"
        )
    if bad := count_not_finite(key, tensor):
        raise UserError(
            f"{source}: {key} holds {bad:,} value{'s that are' if bad > 1 else ' that is'} not finite (of "
            f"{tensor.numel():,}): the training that wrote it had failed; take an earlier checkpoint"
        )


def count_not_finite(key: str, tensor: torch.Tensor) -> int:
    """How many values are NaN or infinite. None of a mask of attention counts: OpenAI's
    CLIP files have them with -inf.
    """
    if not tensor.is_floating_point() or not tensor.numel() or key.endswith("attn_mask"):
        return 0
    numbers = tensor if tensor.element_size() > 1 else tensor.float()  # of 8 bits torch compares none
    if all(map(math.isfinite, torch.aminmax(numbers))):  # one pass, without a copy
        return 0
    return int((~torch.isfinite(numbers)).sum())


KINDS = {  # a key that only this kind of file has -> what it is, and what it is for
    "quantize.embedding.weight": "a VQ-KD tokenizer (for `tokenizer_weight` of pretraining)",
    "tokenizer.quantize.embedding.weight": "a pixel decoder (for visualize_reconstruction.py)",
    "heads.0.weight": "a linear probe (of run_linear_eval.py)",
    "blocks.input.w": "DALL-E's encoder (for `tokenizer_weight` with `tokenizer_model` dall-e)",
    "decode_head.conv_seg.weight": "a segmentation model",
    "lm_head.weight": "a model of masked image modeling (for `finetune`)",
    "head.weight": "a classifier (for `finetune`, or `eval` `resume`)",
    "blocks.0.norm1.weight": "a vision transformer without a head",
}


def describe_kind(keys: Iterable[str]) -> str:
    """What a file with these keys is, in words with an article."""
    present = set(keys)
    found = next((what for key, what in KINDS.items() if key in present), None)
    names = sorted(present)
    return found or f"not a file of ours (it holds {', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
