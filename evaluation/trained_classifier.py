"""A fine-tuned classifier in a file: its weights, its classes, and whether it is asked to
work as it was trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import arguments
from checkpoint_io import published, weight_files, weight_source
from checkpoint_io.checkpoints import to_plain_data
from checkpoint_io.remapping import PATCHES, describe_patches, load_remapped
from data_pipeline.imagenet_classes import RobustSet, synsets
from errors import UserError
from modeling_finetune import VisionTransformer
from runtime.terminal import log

# What the model is made of, and what its images look like: flags that should be those of the training.
SHAPING = ("model", "use_mean_pooling", "abs_pos_emb", "rel_pos_bias", "qkv_bias", "layer_scale_init_value")
SEEING = ("input_size", "imagenet_default_mean_and_std", "crop_pct")
# What fine-tuning must be told again, because it builds a model of its own: else
# positions are dropped or start anew.
KEPT_FROM_PRETRAINING = ("abs_pos_emb", "rel_pos_bias", "imagenet_default_mean_and_std")


@dataclass(frozen=True)
class TrainedClassifier:
    """`flags`: those of its training, {} where the file does not tell; `classes`: names in
    the order of its logits, or None.
    """

    source: str
    weights: dict[str, Tensor]
    flags: Mapping[str, Any]
    classes: list[str] | None

    @property
    def nb_classes(self) -> int:
        return len(self.weights["head.bias"])


def select_weights(weights: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Tensor]:
    """--model_filter_name and --model_prefix: only keys that begin so, without it. UserError: there are none."""
    for flag, start in (
        ("`model_filter_name`", args.model_filter_name),
        ("`model_prefix`", args.model_prefix),
    ):
        chosen = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
        if not chosen:
            raise UserError(f"{flag} {start}: no key begins so; there are {', '.join(list(weights)[:3])} ...")
        weights = chosen
    return weights


def read_classifier(args: argparse.Namespace) -> TrainedClassifier:
    """--resume, else --finetune; with --model_ema the moving average of the weights in it."""
    source, flag = (args.resume, "`resume`") if args.resume else (args.finetune, "`finetune`")
    read = weight_source.read_weights(
        source,
        ema=args.model_ema,
        keys=args.model_key,
        select=lambda weights: select_weights(weights, args),
        flag=flag,
    )
    if "head.bias" not in read.weights:
        raise UserError(
            f"{flag} {source} is {weight_files.describe_kind(read.weights)}: `eval` needs a classifier"
        )
    return TrainedClassifier(source, read.weights, read.flags, read.classes)


def load_classifier(
    trained: TrainedClassifier,
    model: VisionTransformer,
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
) -> None:
    """Every weight of the file into the model, which must be the one that was trained; say what else differs."""
    fitting, missing = load_remapped(model, trained.weights)
    unused = find_unused(trained.weights, fitting)
    if missing or unused:
        what = f"it lacks {missing[0]}" if missing else f"it also holds {unused[0]}"
        raise UserError(
            f"{trained.source} is not the model that `model` and the flags around it describe: {what}"
            f"{suggest_training_flags(trained, parser, args)}"
        )
    warn_of_other_images(trained, fitting, parser, args)
    if fitting[PATCHES].shape != trained.weights[PATCHES].shape:
        log.warning(
            f"warning: {trained.source} was trained on {describe_patches(trained.weights[PATCHES])}: adapted to "
            f"{describe_patches(fitting[PATCHES])}, and its accuracy may suffer"
        )


def find_unused(weights: Mapping[str, Tensor], fitting: Mapping[str, Tensor]) -> list[str]:
    """What the model has no place for; a bias table that all blocks share is used when it went into every block."""
    unused = [key for key in weights if key not in fitting and not key.endswith("position_index")]
    if any(key.startswith("blocks.") and key.endswith("relative_position_bias_table") for key in fitting):
        unused = [key for key in unused if not key.endswith("rel_pos_bias.relative_position_bias_table")]
    return unused


def suggest_training_flags(
    trained: TrainedClassifier, parser: argparse.ArgumentParser, args: argparse.Namespace
) -> str:
    """The way out of a model that does not fit, as far as the file or its published name tells."""
    theirs = ", ".join(other for other, _ in compare_flags(trained.flags, parser, args, SHAPING))
    entry = published.ENTRIES.get(trained.source)
    if not theirs and entry and entry.model != args.model:
        theirs = f"`model` {entry.model}"
    return f"; it was trained with {theirs}" if theirs else "; give the flags of its training"


def warn_of_other_images(
    trained: TrainedClassifier,
    fitting: Mapping[str, Tensor],
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
) -> None:
    """Images of another size or normalization than in training are allowed, and told."""
    pairs = compare_flags(trained.flags, parser, args, SEEING)
    if pairs:
        log.warning(
            f"warning: {trained.source} was trained with {', '.join(theirs for theirs, _ in pairs)} "
            "and is evaluated with "
            f"{', '.join(ours for _, ours in pairs)}: its accuracy may suffer"
        )
    if "input_size" not in trained.flags and any(
        value.shape != trained.weights.get(key, value).shape for key, value in fitting.items()
    ):
        log.warning(
            f"warning: {trained.source} was trained on images of another size than `input_size` "
            f"{args.input_size}: its "
            "positions were interpolated, and its accuracy may suffer"
        )


def warn_of_other_pretraining(
    weights: Mapping[str, Tensor],
    flags: Mapping[str, Any],
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
) -> None:
    """Fine-tuning may use other positions or another normalization than --finetune's training, but is told.

    `flags`: of that training, {} where unknown. The positions are then what the weights
    hold; a tokenizer's normalization is its --process_type.
    """
    known: dict[str, Any] = {"abs_pos_emb": "pos_embed" in weights}
    known["rel_pos_bias"] = any(key.endswith("relative_position_bias_table") for key in weights)
    known |= flags
    if "process_type" in flags:
        known["imagenet_default_mean_and_std"] = flags["process_type"] == "imagenet_norm"
    pairs = compare_flags(known, parser, args, KEPT_FROM_PRETRAINING)
    if pairs:
        log.warning(
            f"warning: `finetune` {args.finetune} was trained with "
            f"{', '.join(theirs for theirs, _ in pairs)} and is "
            f"fine-tuned with {', '.join(ours for _, ours in pairs)}: give the flags of its training, "
            "unless the change "
            "is meant"
        )


def compare_flags(
    flags: Mapping[str, Any], parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str]
) -> list[tuple[str, str]]:
    """(as it was trained, as it is now) for each of `names` that the training's flags tell otherwise."""
    return [
        (
            arguments.format_flag(parser, name, flags[name]),
            arguments.format_flag(parser, name, getattr(args, name)),
        )
        for name in names
        if name in flags and to_plain_data(flags[name]) != to_plain_data(getattr(args, name))
    ]


def refuse_other_classes(trained: TrainedClassifier, classes: Sequence[str], where: str) -> None:
    """The names behind the labels must be those behind the logits, as far as both are
    known. `where`: flag and folder.
    """
    if len(classes) != trained.nb_classes:
        hint = "; for ImageNet-A or -R add `robust_test`" if set(classes) <= set(synsets()) else ""
        raise UserError(
            f"{trained.source} tells {trained.nb_classes} classes apart, {where} has {len(classes)}{hint}"
        )
    if trained.classes and list(classes) != trained.classes:
        raise UserError(
            f"{where} has other classes than {trained.source}: {describe_difference(trained.classes, classes)}"
        )


def refuse_other_than_imagenet(trained: TrainedClassifier, robust: RobustSet) -> None:
    """The robustness sets' folders say which of ImageNet-1k's logits are meant."""
    if trained.nb_classes != len(synsets()) or (trained.classes or synsets()) != synsets():
        what = (
            f"tells {trained.nb_classes} others apart"
            if trained.classes
            else f"tells {trained.nb_classes} classes apart"
        )
        raise UserError(
            f"`robust_test`: {robust.name} needs a model of ImageNet's 1000 classes, {trained.source} {what}"
        )


def describe_difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Where two lists of class names part, in words."""
    if len(theirs) != len(ours):
        return f"it has {len(theirs)} classes, here are {len(ours)}"
    number, (one, other) = next(
        (i, pair) for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]
    )
    return f"its class {number} is '{one}', here it is '{other}'"


def refuse_resuming_other_classes(state: Mapping[str, Any], classes: Sequence[str], way_out: str) -> None:
    """A resumed run must name its classes as before; `state`: of the stage, which in older
    checkpoints holds no names.
    """
    theirs = state.get("classes") or classes
    if classes and list(theirs) != list(classes):
        raise UserError(
            "the checkpoint to resume was trained on other classes: "
            f"{describe_difference(theirs, classes)}; give {way_out}, or "
            "start anew from these weights with `finetune` and another `output_dir`"
        )
