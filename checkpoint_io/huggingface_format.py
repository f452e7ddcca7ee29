"""BEiT as Hugging Face has it: its names, its config.json and its
preprocessor_config.json.

All is written and read without importing transformers, which brings a module named
`datasets`, as one of ours is called. The names are those that the models on the hub
have; transformers 5 renamed the modules (MODERN) and still reads these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from checkpoint_io.weight_formats import (
    INDEX,
    SHARED_TABLE,
    TABLE,
    ConvertedWeights,
    ExternalConfig,
    Preprocessing,
    Weights,
    to_range,
)
from errors import UserError
from layers.rel_pos_bias import as_pair

MASKED_IMAGE, CLASSIFIER, BACKBONE = "BeitForMaskedImageModeling", "BeitForImageClassification", "BeitModel"
ARCHITECTURES = (CLASSIFIER, BACKBONE, MASKED_IMAGE)

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
    """Whether these are keys of a Hugging Face BEiT, with `beit.` in front or
    without.
    """
    return any(key.removeprefix("beit.") == "embeddings.patch_embeddings.projection.weight" for key in keys)


def from_huggingface(state_dict: Mapping[str, Tensor]) -> Weights:
    """The state dict of a Hugging Face BEiT under our names. UserError: a layer without
    its q, k or v.
    """
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
    """`key`, or the module in front of its last part, under the table's name; None
    where the table has neither.
    """
    if key in table:
        return table[key]
    module, _, leaf = key.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else None


def to_huggingface(weights: Mapping[str, Tensor], architecture: str) -> ConvertedWeights:
    """Our state dict -> the state dict of `architecture` (one of ARCHITECTURES)."""
    heads = {MASKED_IMAGE: ("norm", "lm_head"), CLASSIFIER: ("head",), BACKBONE: ()}[architecture]
    other_heads = {"cls_pt_layers", "cls_pt_norm", "cls_pt_lm_head", *({"head", "lm_head"} - set(heads))}
    model: Weights = {}
    dropped, notes = [], ["each qkv matrix was split into query, key and value"]
    no_bias = "blocks.0.attn.q_bias" not in weights
    if no_bias:
        notes.append("the biases of query and value, which this model lacks, were written as zeros")
    for key, value in weights.items():
        first, _, rest = key.partition(".")
        number, _, inside = rest.partition(".")
        layer = f"encoder.layer.{number}."
        if key.endswith(INDEX):
            continue  # follows from the grid
        if first in other_heads:
            dropped.append(key)
        elif inside == "attn.qkv.weight" and first == "blocks":
            model |= {layer + name: part for name, part in zip(QKV, value.chunk(3), strict=True)}
            if no_bias:
                zeros = {name: value.new_zeros(value.shape[1]) for name in ("attn.q_bias", "attn.v_bias")}
                model |= {layer + IN_BLOCK[name]: zero for name, zero in zeros.items()}
        else:
            name = _rename(inside, IN_BLOCK) if first == "blocks" else _rename(key, OUTSIDE)
            if name is None:
                dropped.append(key)
            else:
                model[layer + name if first == "blocks" else name] = value
    at_top = {OUTSIDE[head] for head in heads}
    in_class = {
        n if architecture == BACKBONE or n.split(".")[0] in at_top else f"beit.{n}": v
        for n, v in model.items()
    }
    return ConvertedWeights(in_class, dropped, notes)


def make_huggingface_config(
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
            f"Hugging Face's BEiT misplaces the patches of images of {height} x {width} pixels: only square "
            "ones fit"
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


def make_huggingface_preprocessor(
    size: int, prepared: Preprocessing, image_range: tuple[float, float] | None = None
) -> dict[str, Any]:
    """preprocessor_config.json: the evaluation view. (BeitImageProcessor of
    transformers 4 only squeezes images to squares.) An `image_range`, else 0 to 255,
    becomes a factor and a shift of the mean; the range itself is read by us alone.
    """
    low, high = image_range or (0.0, 255.0)
    return {
        **({} if image_range is None else {"image_range": [low, high]}),
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(prepared.mean) == 3 and image_range is None,
        "do_resize": True,
        "size": {"shortest_edge": int(size / prepared.crop_pct)},
        "resample": 3,  # PIL's bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / (high - low),
        "do_normalize": True,
        "image_mean": [value + low / (high - low) for value in prepared.mean],
        "image_std": list(prepared.std),
    }


def read_huggingface_config(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ExternalConfig:
    """What config.json and preprocessor_config.json say. UserError: they are of another
    kind of model.
    """
    if config.get("model_type") != "beit" or config.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            f"config.json describes a {config.get('model_type')} with {config.get('hidden_act')}, not a "
            "BEiT with gelu"
        )
    size = as_pair(config.get("image_size", 224))
    prepared, image_range = None, to_range(preprocessor.get("image_range"))
    if "image_mean" in preprocessor and "image_std" in preprocessor:
        resized = preprocessor.get("size", {})
        edge = (
            resized.get("shortest_edge", resized.get("height", size[0]))
            if isinstance(resized, Mapping)
            else resized
        )
        share = max(size) / edge if preprocessor.get("do_center_crop") else 1.0
        share = math.floor(min(share, 1.0) * 1e6) / 1e6  # rounded down: int(size / share) is the edge again
        low, high = image_range or (0.0, 255.0)
        mean = tuple(value - low / (high - low) for value in preprocessor["image_mean"])
        prepared = Preprocessing(mean, tuple(preprocessor["image_std"]), share)
    labels = config.get("id2label") or {}
    names = [labels[number] for number in sorted(labels, key=int)]
    unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    return ExternalConfig(
        num_heads=config.get("num_attention_heads", 12),
        img_size=size,
        prepared=prepared,
        classes=None if unnamed else names,
        norm_eps=config.get("layer_norm_eps", 1e-12),
        image_range=image_range,
    )
