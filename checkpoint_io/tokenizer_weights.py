"""What is in a tokenizer's file."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint_io import downloads, weight_files, weight_formats
from errors import UserError

TokenizerContent = tuple[dict[str, Tensor], dict[str, Any]]  # state dict, flags of the training


def count_blocks(weights: dict[str, Tensor], part: str) -> int:
    """How many blocks `encoder` or `decoder` has."""
    start = f"{part}.blocks."
    return len({key[len(start) :].split(".")[0] for key in weights if key.startswith(start)})


def read_tokenizer(source: str, origin: str) -> TokenizerContent:
    """The state dict of the tokenizer in a file (path, URL or published name), and the
    flags it was trained with, {} where they are not known.

    Teacher, scaling and loss entries of released files are left out. `origin` names the
    file in messages. UserError: it holds no VQ-KD tokenizer, or one without a codebook.
    """
    content = weight_files.load_file(downloads.fetch(source))
    weights = weight_formats.strip_wrappers(weight_files.extract_weights(content, source))
    require_tokenizer(weights, origin)
    if float(weights.get("quantize.embedding.initted", torch.ones(1))) == 0:
        raise UserError(
            f"the tokenizer in {source} was never given a codebook: its training ended in the quantizer's "
            "warm-up"
        )
    own = ("encoder.", "decoder.", "encode_task_layer.", "decode_task_layer.", "quantize.", "target_")
    flags = weight_files.flags_to_dict(content.get("args") if isinstance(content, dict) else None)
    return {key: value for key, value in weights.items() if key.startswith(own)}, flags


def require_tokenizer(weights: dict[str, Tensor], origin: str) -> None:
    """UserError where these are not the weights of a VQ-KD tokenizer."""
    for key in ("quantize.embedding.weight", "encoder.pos_embed", "decode_task_layer.2.bias"):
        if key not in weights:
            raise UserError(f"{origin} holds no VQ-KD tokenizer (no {key} in it)")


def check_codebook(weights: dict[str, Tensor], n_codes: int, code_dim: int, source: str) -> None:
    found = tuple(weights["quantize.embedding.weight"].shape)
    if found != (n_codes, code_dim):
        raise UserError(
            f"the tokenizer in {source} has {found[0]} codes of dim {found[1]}, not {n_codes} of {code_dim}: "
            f"pass `codebook_size` {found[0]} `codebook_dim` {found[1]} (in run_vqkd_training.py "
            "`codebook_n_emd` and `codebook_emd_dim`)"
        )


def infer_decoder_depth(weights: dict[str, Tensor], asked: int | None, source: str) -> int:
    """Blocks of the decoder in a tokenizer's state dict; UserError when another number
    was asked for.
    """
    depth = count_blocks(weights, "decoder")
    if asked not in (None, depth):
        raise UserError(
            f"the tokenizer in {source} has a decoder of {depth} blocks: leave `decoder_depth` {asked} out"
        )
    return depth


def infer_in_chans(weights: dict[str, Tensor], asked: int | None = None, source: str = "") -> int:
    """Channels of the images that a tokenizer encodes; UserError when another number
    was asked for.
    """
    channels = weights["encoder.patch_embed.proj.weight"].shape[1]
    if asked not in (None, channels):
        raise UserError(
            f"the tokenizer in {source} encodes images of {channels} channels, not {asked}: train one with "
            f"`in_chans` {asked}, or name its channels in the images with `teacher_channels`"
        )
    return channels


def load_tokenizer_weights(
    model: nn.Module, weights: dict[str, Tensor], settings: dict[str, Any], source: str
) -> None:
    """`settings`: the tokenizer that these weights are of, for the message when `model`
    is another.
    """
    wanted = model.state_dict()
    for key in weights:
        unused = re.match(r"(encoder|decoder)\.(head\.|fc_norm\.|.*relative_position_index$)", key)
        if key.startswith(("encoder.", "decoder.")) and key not in wanted and not unused:
            raise UserError(
                f"{source} is of another architecture, which no tokenizer here computes: it holds {key}"
            )
    missing = [key for key in wanted if key not in weights and not key.startswith("target_")]
    misfits = [key for key, value in weights.items() if key in wanted and wanted[key].shape != value.shape]
    if missing or misfits:
        side, fitting = settings["img_size"], settings["name"]
        reason = f"it is a {fitting}, or of that size"
        positions = "encoder.pos_embed"
        if positions in misfits and weights[positions].shape[-1] == wanted[positions].shape[-1]:
            reason = f"it was trained on {side}-pixel images: `second_input_size` {side}"
        raise UserError(
            f"{source} does not fit `tokenizer_model` ({(misfits + missing)[0]} differs): {reason}"
        )
    model.load_state_dict(weights, strict=False)
