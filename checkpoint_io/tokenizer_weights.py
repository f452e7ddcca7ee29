"""What is in a tokenizer's file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from checkpoint_io import downloads, weight_files, weight_formats
from errors import UserError


def depth_of(weights: dict[str, Tensor], part: str) -> int:
    """How many blocks `encoder` or `decoder` has."""
    start = f"{part}.blocks."
    return len({key[len(start) :].split(".")[0] for key in weights if key.startswith(start)})


def read_tokenizer(source: str, n_code: int, code_dim: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A tokenizer's state dict, checked against the codebook asked for, and the flags it
    was trained with, if known.

    Teacher, scaling and loss entries of released files are left out.
    """
    content = weight_files.load_file(downloads.fetch(source))
    weights = weight_formats.strip_wrappers(weight_files.extract_weights(content, source))
    codebook = weights.get("quantize.embedding.weight")
    if codebook is None or "decode_task_layer.2.bias" not in weights:
        raise UserError(
            f"`tokenizer_weight` {source} holds no VQ-KD tokenizer (no quantize.embedding.weight in it)"
        )
    if tuple(codebook.shape) != (n_code, code_dim):
        raise UserError(
            f"the tokenizer in {source} has {codebook.shape[0]} codes of dim {codebook.shape[1]}, not "
            f"{n_code} of {code_dim}: "
            f"pass `codebook_size` {codebook.shape[0]} `codebook_dim` {codebook.shape[1]} (in "
            "run_vqkd_training.py "
            "`codebook_n_emd` and `codebook_emd_dim`)"
        )
    if float(weights.get("quantize.embedding.initted", torch.ones(1))) == 0:
        raise UserError(
            f"the tokenizer in {source} was never given a codebook: its training ended in "
            "the quantizer's warm-up"
        )
    own = ("encoder.", "decoder.", "encode_task_layer.", "decode_task_layer.", "quantize.", "target_")
    flags = content.get("args") if isinstance(content, dict) else None
    return {key: value for key, value in weights.items() if key.startswith(own)}, weight_files.flags_to_dict(
        flags
    )


def decoder_depth_of(weights: dict[str, Tensor], asked: int | None, source: str) -> int:
    """Blocks of the decoder in a tokenizer's state dict; UserError when another number was asked for."""
    depth = depth_of(weights, "decoder")
    if asked not in (None, depth):
        raise UserError(
            f"the tokenizer in {source} has a decoder of {depth} blocks: leave `decoder_depth` {asked} out"
        )
    return depth
