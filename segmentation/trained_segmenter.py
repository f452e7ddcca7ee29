"""Segmentation models from weight files: a backbone to start from, or a finished model
built from its file alone.
"""

from __future__ import annotations

from torch import Tensor

import modeling_segmentation
import pretrained
from checkpoint_io import weight_files, weight_source
from checkpoint_io.weight_source import WeightSource
from errors import ParameterError, UserError
from evaluation.trained_classifier import describe_difference
from modeling_segmentation import Segmenter
from runtime.terminal import log

HEADS = ("decode_head.", "auxiliary_head.")
CLASSIFIER = "decode_head.conv_seg.weight"
# What a finished model's images must look like: taken from its file where nothing else
# is
# asked for.
LOOKS_AS_TRAINED = (
    "input_size",
    "base_size",
    "stride",
    "whole_image",
    "imagenet_default_mean_and_std",
    "in_chans",
    "image_range",
    "mean_std",
    "reduce_zero_label",
)


def split_parts(content: WeightSource) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone's weights, under the names of a ViT, and the heads'."""
    heads = {key: value for key, value in content.weights.items() if key.startswith(HEADS)}
    return {key: value for key, value in content.weights.items() if key not in heads}, heads


def load_pretrained(model: Segmenter, content: WeightSource, source: str) -> None:
    """Load what fits of a pretrained backbone or of a segmentation model, with a
    report. `source` names it in messages.
    """
    backbone, heads = split_parts(content)
    pretrained.load_fitting(model.backbone, backbone, source)
    if heads:
        own = model.state_dict()
        fitting = {key: value for key, value in heads.items() if key in own and value.shape == own[key].shape}
        model.load_state_dict(fitting, strict=False)
        log.info(f"heads      used {len(fitting)} of {len(heads)} tensors of the file")


def read_segmenter(source: str, origin: str) -> WeightSource:
    """A finished segmentation model's file. UserError: another kind of file."""
    content = weight_source.read_weights(source, origin=origin)
    if CLASSIFIER not in content.weights:
        raise UserError(
            f"{origin} {source} is {weight_files.describe_kind(content.weights)}: a segmentation model is "
            "needed"
        )
    return content


def build_segmenter(content: WeightSource, source: str) -> Segmenter:
    """Build the model in a file by the shapes of its weights, in eval mode. `source`
    names it in messages.
    """
    backbone, heads = split_parts(content)
    classifier, auxiliary = heads[CLASSIFIER], heads.get("auxiliary_head.conv_seg.weight")
    try:
        settings = pretrained.infer_architecture(content.weights, content.flags)
    except UserError as error:
        raise UserError(f"{source} has no backbone that could be used: {error}") from None
    del settings["num_classes"], settings["use_mean_pooling"]
    model = modeling_segmentation.assemble(
        "upernet" if any(key.startswith("decode_head.psp_modules.") for key in heads) else "setr_pup",
        settings,
        num_classes=len(classifier),
        channels=classifier.shape[1],
        aux_channels=0 if auxiliary is None else auxiliary.shape[1],
    )
    try:
        missing, unexpected = model.load_state_dict(
            {**{f"backbone.{k}": v for k, v in backbone.items()}, **heads}, strict=False
        )
    except RuntimeError as error:  # shapes
        why = str(error).splitlines()[-1].strip()
        raise UserError(f"{source} does not fit the model that its own shapes describe: {why}") from None
    missing, unexpected = (
        [key for key in keys if not key.endswith("relative_position_index")] for keys in (missing, unexpected)
    )
    if missing or unexpected:
        what = f"it lacks {missing[0]}" if missing else f"it also holds {unexpected[0]}"
        raise UserError(f"{source} is not a segmentation model of ours or of the released ones: {what}")
    return model.eval()


def choose_class_names(content: WeightSource, given: list[str], source: str) -> list[str]:
    """The names of the file's classes: its own, else the `given` ones, else numbers.
    UserError where the given ones are others.
    """
    count = len(content.weights[CLASSIFIER])
    if given and (len(given) != count or (content.classes and content.classes != given)):
        difference = describe_difference(
            content.classes or [f"class {number}" for number in range(count)], given
        )
        raise ParameterError(
            f"`class_names` names other classes than {source} has: {difference}; correct it, or leave it out"
        )
    return content.classes or given or [f"class {number}" for number in range(count)]
