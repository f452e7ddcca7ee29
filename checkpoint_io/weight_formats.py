"""BEiT and plain ViTs under the names of other libraries, and what wraps them. Pure functions on dictionaries.

timm kept the published names, which are ours too; it differs in what a model may have.
Plain ViTs (MAE, DeiT, DINO) have one bias for q, k and v. Hugging Face renamed
everything and split qkv. Both libraries' configuration files are written here as well,
so that neither has to be imported: Hugging Face's brings a module named `datasets`,
which is also one of ours.

Shapes: C width, H heads, L blocks, n patches on a side of the grid; a table of relative
positions is ((2n - 1)^2 + 3, H).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errors import UserError

TABLE, INDEX = "relative_position_bias_table", "relative_position_index"
SHARED_TABLE = f"rel_pos_bias.{TABLE}"
MASKED_IMAGE, CLASSIFIER, BACKBONE = "BeitForMaskedImageModeling", "BeitForImageClassification", "BeitModel"
ARCHITECTURES = (CLASSIFIER, BACKBONE, MASKED_IMAGE)

TIMM_ARGS = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
             "init_values", "use_abs_pos_emb")  # fmt: skip

Weights = dict[str, Tensor]


class ConvertedWeights(NamedTuple):
    """Weights under other names, the keys that have no home there, and what else was done, in sentences."""

    weights: Weights
    left_out: list[str]
    notes: list[str]


class Preprocessing(NamedTuple):
    """What happens to an image before it is classified: shorter side to size / crop_pct,
    center crop, normalization.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float


class ExternalConfig(NamedTuple):
    """What another library's configuration says beside the weights; None where it does not."""

    num_heads: int | None
    img_size: tuple[int, int] | None
    prepared: Preprocessing | None
    classes: list[str] | None


# ── Wrappers ──

# What torch.compile, FSDP and activation checkpointing put into a name, wherever they
# wrap; no module is called so.
INSIDE_NAMES = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What DDP, Lightning and other people's models put in front of all names, also one inside the other.
WRAPPERS = r"(?:(?:module|model|net|encoder|backbone)\.)*"
# A key that tells where a model begins. A tokenizer comes first: its `encoder.` is a part of it.
STARTS = (
    r"(?:tokenizer\.)?quantize\.embedding\.weight",
    r"patch_embed\.proj\.weight",
    r"(?:beit\.)?embeddings\.patch_embeddings\.projection\.weight",
    r"blocks\.0\.norm1\.weight",
)


def strip_wrappers(state_dict: Mapping[str, Tensor]) -> Weights:
    """The entries without what wrappers put in front of the names of a ViT or of a VQ-KD
    tokenizer, and into them.

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

LAYER_SCALE = {
    **{
        "ls1.gamma": "gamma_1",
        "lambda1": "gamma_1",
        "lambda_1": "gamma_1",
        "layer_scale1.lambda1": "gamma_1",
    },
    **{
        "ls2.gamma": "gamma_2",
        "lambda2": "gamma_2",
        "lambda_2": "gamma_2",
        "layer_scale2.lambda1": "gamma_2",
    },
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
    """Blocks of plain ViTs as ours: layer scale by our names; of a bias of q, k and v the
    first and the last third.

    A key's bias is dropped, exactly: it adds the same to all scores of a query, which softmax does not see.
    UserError: such a bias is not of three equal parts, or stands beside those of query and value.
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


# ── Hugging Face ──
# The names that the models on their hub have. transformers 5 renamed the modules
# (MODERN) and still reads these.

IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "attn.proj": "attention.output.dense",
    f"attn.{TABLE}": f"attention.attention.relative_position_bias.{TABLE}",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
}
OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    SHARED_TABLE: f"encoder.relative_position_bias.{TABLE}",
    "norm": "layernorm",
    "fc_norm": "pooler.layernorm",
    "head": "classifier",
    "lm_head": "lm_head",
}
QKV = [f"attention.attention.{part}.weight" for part in ("query", "key", "value")]
MODERN = [
    (r"^layers\.", "encoder.layer."),
    (r"^shared_position_bias\.", "encoder.relative_position_bias."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^(encoder\.layer\.\d+)\.relative_position_bias\.", r"\1.attention.attention.relative_position_bias."),
]


def is_huggingface(keys: Iterable[str]) -> bool:
    """Whether these are keys of a Hugging Face BEiT, with `beit.` in front or without."""
    return any(key.removeprefix("beit.") == "embeddings.patch_embeddings.projection.weight" for key in keys)


def to_our_names(state_dict: Mapping[str, Tensor]) -> Weights:
    """A state dict of Hugging Face's BEiT, timm's, or a plain ViT under our names; ours
    comes back as it is, and is not copied.

    Keys that are nobody's (a segmentation head) keep their names. UserError: as
    strip_wrappers, from_plain_blocks and refuse_other_parts; a Hugging Face layer
    without its q, k or v.
    """
    bare = strip_wrappers(state_dict)
    ours = from_plain_blocks(from_huggingface(bare) if is_huggingface(bare) else bare)
    refuse_other_parts(ours)
    return ours


def from_huggingface(state_dict: Mapping[str, Tensor]) -> Weights:
    """UserError: a layer without its q, k or v."""
    in_block, outside = ({theirs: ours for ours, theirs in table.items()} for table in (IN_BLOCK, OUTSIDE))
    classic = {_to_classic_name(key): value for key, value in state_dict.items()}
    ours: Weights = {}
    for key, value in classic.items():
        layer = re.match(r"encoder\.layer\.(\d+)\.(.+)", key)
        if layer is None:
            ours[_rename(key, outside) or key] = value
            continue
        number, rest = layer.groups()
        if rest == QKV[0]:
            parts = [classic.get(f"encoder.layer.{number}.{name}") for name in QKV]
            if any(part is None for part in parts):
                raise UserError(f"layer {number} lacks its key or its value: the file is incomplete")
            ours[f"blocks.{number}.attn.qkv.weight"] = torch.cat([part for part in parts if part is not None])
        elif rest not in QKV and not rest.endswith(("key.bias", INDEX)):
            ours[f"blocks.{number}.{_rename(rest, in_block) or rest}"] = value
    return ours


def _to_classic_name(key: str) -> str:
    key = key.removeprefix("beit.")
    for pattern, name in MODERN:
        key = re.sub(pattern, name, key)
    return key


def _rename(key: str, table: Mapping[str, str]) -> str | None:
    """`key`, or the module in front of its last part, under the table's name; None where the table has neither."""
    if key in table:
        return table[key]
    module, _, leaf = key.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else None


def to_huggingface(weights: Mapping[str, Tensor], architecture: str) -> ConvertedWeights:
    """Our state dict -> the state dict of `architecture` (one of ARCHITECTURES)."""
    heads = {MASKED_IMAGE: ("norm", "lm_head"), CLASSIFIER: ("head",), BACKBONE: ()}[architecture]
    dropped = {"cls_pt_layers", "cls_pt_norm", "cls_pt_lm_head", *({"head", "lm_head"} - set(heads))}
    model: Weights = {}
    left_out, notes = [], ["each qkv matrix was split into query, key and value"]
    no_bias = "blocks.0.attn.q_bias" not in weights
    if no_bias:
        notes.append("the biases of query and value, which this model lacks, were written as zeros")
    for key, value in weights.items():
        first, _, rest = key.partition(".")
        number, _, inside = rest.partition(".")
        layer = f"encoder.layer.{number}."
        if key.endswith(INDEX):
            continue  # follows from the grid
        if first in dropped:
            left_out.append(key)
        elif inside == "attn.qkv.weight" and first == "blocks":
            model |= {layer + name: part for name, part in zip(QKV, value.chunk(3), strict=True)}
            if no_bias:
                zeros = {name: value.new_zeros(value.shape[1]) for name in ("attn.q_bias", "attn.v_bias")}
                model |= {layer + IN_BLOCK[name]: zero for name, zero in zeros.items()}
        else:
            name = _rename(inside, IN_BLOCK) if first == "blocks" else _rename(key, OUTSIDE)
            if name is None:
                left_out.append(key)
            else:
                model[layer + name if first == "blocks" else name] = value
    at_top = {OUTSIDE[head] for head in heads}
    in_class = {
        n if architecture == BACKBONE or n.split(".")[0] in at_top else f"beit.{n}": v
        for n, v in model.items()
    }
    return ConvertedWeights(in_class, left_out, notes)


def huggingface_config(
    model: Mapping[str, Any],
    architecture: str,
    vocab_size: int,
    drop_path: float,
    names: Sequence[str] | None,
) -> dict[str, Any]:
    """config.json of a model folder. `model`: the VisionTransformer's arguments;
    `vocab_size` 0: no head for masked images.

    UserError for images that are not square: Hugging Face's relative positions and
    absolute ones are wrong for them.
    """
    height, width = model["img_size"]
    if height != width:
        raise UserError(
            f"Hugging Face's BEiT misplaces the patches of images of {height} x {width} pixels: only "
            "square ones fit"
        )
    labels: dict[str, Any] = {}
    if architecture == CLASSIFIER:
        names = names or [f"LABEL_{number}" for number in range(model["num_classes"])]
        labels["id2label"] = {str(number): name for number, name in enumerate(names)}
        labels["label2id"] = {name: number for number, name in enumerate(names)}
    return {
        "architectures": [architecture],
        "model_type": "beit",
        "torch_dtype": "float32",
        "hidden_size": model["embed_dim"],
        "num_hidden_layers": model["depth"],
        "num_attention_heads": model["num_heads"],
        "intermediate_size": int(model["embed_dim"] * model["mlp_ratio"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,  # their default, 1e-12, is not what BEiT was trained with
        "image_size": height,
        "patch_size": model["patch_size"],
        "num_channels": model["in_chans"],
        "vocab_size": vocab_size or 8192,
        "use_mask_token": vocab_size > 0,
        "use_absolute_position_embeddings": model["use_abs_pos_emb"],
        "use_relative_position_bias": model["use_rel_pos_bias"],
        "use_shared_relative_position_bias": model["use_shared_rel_pos_bias"],
        "layer_scale_init_value": float(model["init_values"]),  # transformers 5 refuses an int
        "drop_path_rate": drop_path,
        # BeitForMaskedImageModeling norms the tokens itself; with CLS pooling the model
        # in it would do so before.
        "use_mean_pooling": model["use_mean_pooling"] or architecture == MASKED_IMAGE,
        **labels,
    }


def huggingface_preprocessor(size: int, prepared: Preprocessing) -> dict[str, Any]:
    """preprocessor_config.json: the evaluation view. (BeitImageProcessor of transformers 4
    only squeezes images to squares.)
    """
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": int(size / prepared.crop_pct)},
        "resample": 3,  # PIL's bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(prepared.mean),
        "image_std": list(prepared.std),
    }


def read_huggingface_config(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ExternalConfig:
    """UserError: another kind of model."""
    if config.get("model_type") != "beit" or config.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            f"config.json describes a {config.get('model_type')} with {config.get('hidden_act')}, not "
            "a BEiT with gelu"
        )
    size = as_size(config.get("image_size", 224))
    prepared = None
    if "image_mean" in preprocessor and "image_std" in preprocessor:
        resized = preprocessor.get("size", {})
        edge = (
            resized.get("shortest_edge", resized.get("height", size[0]))
            if isinstance(resized, Mapping)
            else resized
        )
        share = max(size) / edge if preprocessor.get("do_center_crop") else 1.0
        share = math.floor(min(share, 1.0) * 1e6) / 1e6  # rounded down: int(size / share) is the edge again
        prepared = Preprocessing(tuple(preprocessor["image_mean"]), tuple(preprocessor["image_std"]), share)
    labels = config.get("id2label") or {}
    names = [labels[number] for number in sorted(labels, key=int)]
    unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    return ExternalConfig(config.get("num_attention_heads", 12), size, prepared, None if unnamed else names)


# ── timm ──


def to_timm(weights: Mapping[str, Tensor]) -> ConvertedWeights:
    """Our state dict -> the state dict of timm's `Beit`. A table shared by all blocks is
    added to each block's own.

    timm has no masked images: the mask token and all that predicts codes stay behind.
    """
    model: Weights = {}
    left_out, notes = [], []
    shared = weights.get(SHARED_TABLE)
    for key, value in weights.items():
        if key.endswith(INDEX) or key == SHARED_TABLE:
            continue
        if key.split(".")[0] in ("mask_token", "lm_head", "cls_pt_layers", "cls_pt_norm", "cls_pt_lm_head"):
            left_out.append(key)
        else:
            model[key] = value
    if shared is not None:
        blocks = [
            key.removesuffix("qkv.weight")
            for key in weights
            if key.startswith("blocks.") and key.endswith("qkv.weight")
        ]
        for block in blocks:
            own = weights.get(block + TABLE)
            model[block + TABLE] = shared.clone() if own is None else own + shared
        notes.append(
            f"the relative position bias that all blocks shared was given to each of the {len(blocks)} blocks"
        )
    return ConvertedWeights(model, left_out, notes)


def timm_config(
    model: Mapping[str, Any], prepared: Preprocessing, names: Sequence[str] | None
) -> dict[str, Any]:
    """config.json in the form of timm's hub; `model_args` are the arguments of timm.models.beit.Beit.

    `model`: the VisionTransformer's arguments. The entry point in `architecture` only
    lends its name: the arguments say all.
    """
    pooling = "avg" if model["use_mean_pooling"] else "token"
    return {
        "architecture": "beitv2_large_patch16_224" if model["depth"] == 24 else "beitv2_base_patch16_224",
        "num_classes": model["num_classes"],
        "num_features": model["embed_dim"],
        "global_pool": pooling,
        **({"label_names": list(names)} if names else {}),
        "model_args": {
            **{name: model[name] for name in TIMM_ARGS},
            "global_pool": pooling,
            "use_rel_pos_bias": model["use_rel_pos_bias"] or model["use_shared_rel_pos_bias"],
        },
        "pretrained_cfg": {
            "input_size": [model["in_chans"], *model["img_size"]],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": prepared.crop_pct,
            "crop_mode": "center",
            "mean": list(prepared.mean),
            "std": list(prepared.std),
            "num_classes": model["num_classes"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def read_timm_config(config: Mapping[str, Any]) -> ExternalConfig:
    """`architecture`'s own size counts where `model_args` name no other."""
    settings, facts = config.get("model_args", {}), config.get("pretrained_cfg", config)
    mean, std, crop_pct = (facts.get(key) for key in ("mean", "std", "crop_pct"))
    prepared = Preprocessing(tuple(mean), tuple(std), crop_pct or 1.0) if mean and std else None
    size = settings.get("img_size") or (facts.get("input_size") or (3, 224, 224))[1:]
    names = config.get("label_names") or facts.get("label_names")
    return ExternalConfig(
        settings.get("num_heads"), as_size(size), prepared, list(names) if isinstance(names, list) else None
    )


def as_size(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
