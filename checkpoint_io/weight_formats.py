"""What the formats of weights have in common: names of ours, what wrappers put in front
of them, and the blocks of plain ViTs. Pure functions on dictionaries.

timm kept the published names, which are ours too. Plain ViTs (MAE, DeiT, DINO) have one
bias for q, k and v. Hugging Face renamed everything and split qkv: huggingface_format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from errors import UserError

NORM_EPS = 1e-6  # of the norms of BEiT and of most ViTs; "norm_eps" in weights: another one
TABLE, INDEX = "relative_position_bias_table", "relative_position_index"
SHARED_TABLE = f"rel_pos_bias.{TABLE}"

Weights = dict[str, Tensor]


class ConvertedWeights(NamedTuple):
    """Weights under other names, the keys that were dropped, and what else was done, in
    sentences.
    """

    weights: Weights
    dropped: list[str]
    notes: list[str]


class Preprocessing(NamedTuple):
    """What happens to an image before it is classified: shorter side to size /
    crop_pct, center crop, normalization.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float


class ExternalConfig(NamedTuple):
    """What another library's configuration says beside the weights; None where it does
    not.
    """

    num_heads: int | None
    img_size: tuple[int, int] | None
    prepared: Preprocessing | None
    classes: list[str] | None
    norm_eps: float | None = None
    image_range: tuple[float, float] | None = None  # the numbers that are 0 and 1 before normalization


def to_range(low_high: Any) -> tuple[float, float] | None:
    """`image_range` from a JSON file; None for what is none."""
    if isinstance(low_high, list) and [type(value) in (int, float) for value in low_high] == [True, True]:
        return (low_high[0], low_high[1]) if low_high[0] < low_high[1] else None
    return None


def infer_trunk_parts(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """The parts that a trunk may have or lack, as options of it
    (vit_backbone.TrunkConfig), of weights under our names behind a `prefix`.
    """
    return {
        "norm_eps": float(weights.get(f"{prefix}norm_eps", NORM_EPS)),
        "init_values": 0.1 if f"{prefix}blocks.0.gamma_1" in weights else 0,
        "use_abs_pos_emb": f"{prefix}pos_embed" in weights,
        "use_rel_pos_bias": f"{prefix}blocks.0.attn.{TABLE}" in weights,
        "use_shared_rel_pos_bias": f"{prefix}{SHARED_TABLE}" in weights,
    }


# ── Wrappers ──

# What torch.compile, FSDP and activation checkpointing put into a name, wherever they
# wrap; no module is called so.
INSIDE_NAMES = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What DDP, Lightning and other people's models put in front of all names, also one
# inside the other.
WRAPPERS = r"(?:(?:module|model|net|encoder|backbone)\.)*"
# A key that tells where a model begins. A tokenizer comes first: its `encoder.` is a
# part of it.
STARTS = (
    r"(?:tokenizer\.)?quantize\.embedding\.weight",
    r"patch_embed\.proj\.weight",
    r"(?:beit\.)?embeddings\.patch_embeddings\.projection\.weight",
    r"blocks\.0\.norm1\.weight",
)


def strip_wrappers(state_dict: Mapping[str, Tensor]) -> Weights:
    """The entries without what wrappers put in front of the names of a ViT or of a
    VQ-KD tokenizer, and into them.

    Where a file holds two, the outer one is taken. UserError: an entry stands both
    inside and outside of a wrapper.
    """
    bare = {INSIDE_NAMES.sub("", key): value for key, value in state_dict.items()}
    for start in STARTS:
        found = [match[1] for key in bare if (match := re.fullmatch(f"({WRAPPERS}){start}", key))]
        if not found:
            continue
        stripped: Weights = {}
        for key, value in bare.items():
            name = key
            for wrapper in min(found, key=len).split(".")[:-1]:
                if not name.startswith(f"{wrapper}."):
                    break
                name = name.removeprefix(f"{wrapper}.")
            if name in stripped:
                raise UserError(
                    f"it holds two tensors that could be {name}: save the model's own state dict alone"
                )
            stripped[name] = value
        return stripped
    return bare


# ── Plain ViTs ──

LAYER_SCALE = {  # timm's, DINOv2's and others' names -> ours
    name.format(n): f"gamma_{n}"
    for n in (1, 2)
    for name in ("ls{}.gamma", "lambda{}", "lambda_{}", "layer_scale{}.lambda1")
}
WITH_BIAS = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
OUR_BLOCK = {
    *(f"{module}.{leaf}" for module in WITH_BIAS for leaf in ("weight", "bias")),
    *(
        "attn.qkv.weight",
        "attn.q_bias",
        "attn.v_bias",
        f"attn.{TABLE}",
        f"attn.{INDEX}",
        "gamma_1",
        "gamma_2",
    ),
}
OTHER_PARTS = {  # in a name of what our blocks, patch embedding and tokens lack -> what it is
    r"\b[qk]_norm\b": "queries and keys are normalized",
    r"mlp\.(w\d+|fc1_[gx]|weights_in|weights_out)\b": "its MLPs are gated (SwiGLU)",
    r"\breg(ister)?_tokens?$": "it has register tokens",
    r"\bdist(illation)?_token$": "it has a distillation token",
    r"^(norm_pre|ln_pre)\.": "its tokens are normalized before the blocks",
    r"^rope": "its positions are rotary",
    r"^(patch_embed|embeddings)\.": "its patch embedding is more than one convolution",
    r"^(?!(cls|mask)_token$)[^.]*_tokens?$": "it has tokens of another kind",
}


def from_plain_blocks(weights: Mapping[str, Tensor]) -> Weights:
    """Blocks of plain ViTs as ours: layer scale by our names; of a bias of q, k and v
    the first and the last third.

    A key's bias is dropped, exactly: it adds the same to all scores of a query, which
    softmax does not see. UserError: such a bias is not of three equal parts, or stands
    beside those of query and value.
    """
    ours: Weights = {}
    for key, value in weights.items():
        layer = re.fullmatch(r"((?:blocks|cls_pt_layers)\.\d+\.)(.+)", key)
        block, inside = layer.groups() if layer else ("", key)
        if layer and inside == "attn.qkv.bias":
            if value.ndim != 1 or len(value) % 3 or f"{block}attn.q_bias" in weights:
                raise UserError(
                    f"{key} of shape {tuple(value.shape)} is not the bias of one query, key and value"
                )
            ours[f"{block}attn.q_bias"], _, ours[f"{block}attn.v_bias"] = value.chunk(3)
        elif not key.endswith("attn.k_bias"):
            ours[block + LAYER_SCALE.get(inside, inside) if layer else key] = value
    return ours


def refuse_other_parts(weights: Mapping[str, Tensor]) -> None:
    """UserError: blocks, patch embedding or tokens hold what no BEiT has, without which
    the weights compute something else.
    """
    for key in weights:
        layer = re.fullmatch(r"blocks\.\d+\.(.+)", key)
        if (layer and layer[1] in OUR_BLOCK) or key in ("patch_embed.proj.weight", "patch_embed.proj.bias"):
            continue
        reason = next((why for part, why in OTHER_PARTS.items() if re.search(part, key)), None)
        if layer or reason:
            raise UserError(
                "it is of another architecture, which no model here computes: "
                f"{reason or 'its blocks hold more'} ({key})"
            )
