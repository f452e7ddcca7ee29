"""A fine-tuned classifier in a file: its weights, its classes, and whether it is asked
to work as it was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import pretrained
from checkpoint_io import published, weight_files, weight_source
from checkpoint_io.remapping import PATCHES, describe_patches, load_remapped
from data_pipeline.imagenet_classes import RobustSet, synsets
from errors import ParameterError, UserError
from evaluation.run_flags import RunFlags, compare_flags, take_training_flags
from layers.rel_pos_bias import as_pair
from modeling_finetune import MODELS, VisionTransformer
from runtime.terminal import log
from vit_backbone import SIZES

# What the model is made of, and what its images look like: flags that should be those
# of the training. Those of the first kind are arguments of VisionTransformer.
ARGUMENTS = {
    "use_mean_pooling": "use_mean_pooling",
    "abs_pos_emb": "use_abs_pos_emb",
    "rel_pos_bias": "use_rel_pos_bias",
    "qkv_bias": "qkv_bias",
    "layer_scale_init_value": "init_values",
}
SHAPING = ("model", *ARGUMENTS)
PIXELS = ("image_range", "mean_std")
SEEING = ("input_size", "imagenet_default_mean_and_std", "crop_pct", "in_chans", *PIXELS)
# What fine-tuning must be told again, because it builds a model of its own: else
# positions are dropped or start at random.
KEPT_FROM_PRETRAINING = ("abs_pos_emb", "rel_pos_bias", "imagenet_default_mean_and_std", *PIXELS)


@dataclass(frozen=True)
class TrainedClassifier:
    """`flags`: those of its training, {} where the file does not tell; `classes`: names
    in the order of its logits, or None; `settings`: the arguments of VisionTransformer,
    by the shapes of the weights.
    """

    source: str
    weights: dict[str, Tensor]
    flags: Mapping[str, Any]
    classes: list[str] | None
    settings: dict[str, Any]

    @property
    def nb_classes(self) -> int:
        return len(self.weights["head.bias"])


def select_weights(
    weights: dict[str, Tensor], model_filter_name: str = "", model_prefix: str = ""
) -> dict[str, Tensor]:
    """Only the keys that begin with `model_filter_name`, and of the rest of them only
    those that begin with `model_prefix`; without these beginnings. UserError: there are
    none.
    """
    for parameter, start in (("model_filter_name", model_filter_name), ("model_prefix", model_prefix)):
        chosen = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
        if not chosen:
            keys = ", ".join(list(weights)[:3])
            raise ParameterError(f"`{parameter}` {start}: no key begins so; there are {keys} ...")
        weights = chosen
    return weights


def read_classifier(
    source: str,
    origin: str = "`resume`",
    ema: bool = False,
    keys: str = "model|module",
    select: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> TrainedClassifier:
    """A classifier's file; the parameters are those of weight_source.read_weights.
    UserError: another kind of file.
    """
    read = weight_source.read_weights(source, ema=ema, keys=keys, select=select, origin=origin)
    if "head.bias" not in read.weights:
        kind = weight_files.describe_kind(read.weights)
        raise UserError(f"{origin} {source} is {kind}: a classifier is needed")
    try:
        settings = pretrained.infer_architecture(read.weights, read.flags, read.external.num_heads)
    except UserError as error:
        raise UserError(f"{origin} {source}: {error}") from None
    return TrainedClassifier(source, read.weights, read.flags, read.classes, settings)


def look_as_trained(trained: TrainedClassifier, ours: RunFlags, given: Collection[str]) -> dict[str, Any]:
    """As take_training_flags, of a classifier: its model and what its images look like.
    The size of its images follows from its positions where no flag tells it.
    """
    height, width = as_pair(trained.settings["img_size"])
    theirs = {"input_size": height if height == width else (height, width), **trained.flags}
    if theirs.get("model") not in MODELS:  # of a size that has no name here
        theirs.pop("model", None)
    return take_training_flags(theirs, (*SHAPING, *SEEING), ours, given)


def build_classifier(trained: TrainedClassifier, ours: RunFlags, given: Collection[str]) -> VisionTransformer:
    """The model in the file, in eval mode: by the shapes of its weights, and where the
    user says otherwise (flags in `given`) as `ours` say, which is refused unless every
    weight fits.
    """
    settings = trained.settings | {"num_classes": trained.nb_classes, "in_chans": ours.values["in_chans"]}
    settings["img_size"] = ours.values["input_size"]
    if "model" in given:
        variant = MODELS[ours.values["model"]]
        settings |= {"patch_size": variant.patch_size, **SIZES[variant.size]._asdict()}
    if "rel_pos_bias" in given:
        settings["use_shared_rel_pos_bias"] = False
    settings |= {argument: ours.values[flag] for flag, argument in ARGUMENTS.items() if flag in given}
    try:
        model = VisionTransformer(**settings)
    except ValueError as error:
        raise ParameterError(f"`input_size`: {error}") from None
    load_classifier(trained, model, ours)
    return model.eval()


def load_classifier(trained: TrainedClassifier, model: VisionTransformer, ours: RunFlags) -> None:
    """Load every weight of the file into the model, which must be the one that was
    trained, and warn of other differences.
    """
    fitting, missing = load_remapped(model, trained.weights)
    unused = find_unused(trained.weights, fitting)
    if missing or unused:
        what = f"it lacks {missing[0]}" if missing else f"it also holds {unused[0]}"
        raise UserError(
            f"{trained.source} is not the model that `model` and the flags around it describe: "
            f"{what}{suggest_training_flags(trained, ours)}"
        )
    warn_of_other_images(trained, fitting, ours)
    if fitting[PATCHES].shape != trained.weights[PATCHES].shape:
        log.warning(
            f"warning: {trained.source} was trained on {describe_patches(trained.weights[PATCHES])}: "
            f"adapted to {describe_patches(fitting[PATCHES])}, and its accuracy may suffer"
        )


def find_unused(weights: Mapping[str, Tensor], fitting: Mapping[str, Tensor]) -> list[str]:
    """The keys that the model lacks. A bias table that all blocks share counts as used
    when it went into every block.
    """
    unused = [key for key in weights if key not in fitting and not key.endswith("position_index")]
    if any(key.startswith("blocks.") and key.endswith("relative_position_bias_table") for key in fitting):
        unused = [key for key in unused if not key.endswith("rel_pos_bias.relative_position_bias_table")]
    return unused


def suggest_training_flags(trained: TrainedClassifier, ours: RunFlags) -> str:
    """What to do about a model that does not fit, as far as the file or its published
    name tells.
    """
    theirs = ", ".join(other for other, _ in compare_flags(trained.flags, ours, SHAPING))
    entry = published.ENTRIES.get(trained.source)
    if not theirs and entry and entry.model != ours.values["model"]:
        theirs = f"`model` {entry.model}"
    return f"; it was trained with {theirs}" if theirs else "; give the flags of its training"


def warn_of_other_images(trained: TrainedClassifier, fitting: Mapping[str, Tensor], ours: RunFlags) -> None:
    """Images of another size or normalization than in training are allowed, with a
    warning.
    """
    pairs = compare_flags(trained.flags, ours, SEEING)
    if pairs:
        log.warning(
            f"warning: {trained.source} was trained with {', '.join(before for before, _ in pairs)} and is "
            f"evaluated with {', '.join(now for _, now in pairs)}: its accuracy may suffer"
        )
    if "input_size" not in trained.flags and any(
        value.shape != trained.weights.get(key, value).shape for key, value in fitting.items()
    ):
        log.warning(
            f"warning: {trained.source} was trained on images of another size than `input_size` "
            f"{ours.values['input_size']}: its positions were interpolated, and its accuracy may suffer"
        )


def warn_of_other_pretraining(
    weights: Mapping[str, Tensor], flags: Mapping[str, Any], ours: RunFlags, source: str
) -> None:
    """Fine-tuning may use other positions or another normalization than the
    pretraining, with a warning.

    `flags`: of the pretraining, {} where unknown. The positions are then what the
    weights hold; a tokenizer's normalization is its `process_type`. `source` names the
    weights.
    """
    known: dict[str, Any] = {"abs_pos_emb": "pos_embed" in weights}
    known["rel_pos_bias"] = any(key.endswith("relative_position_bias_table") for key in weights)
    known |= weight_source.translate_process_type(flags)
    kept: Sequence[str] = KEPT_FROM_PRETRAINING
    if known.get("in_chans", 3) != ours.values.get("in_chans", 3):  # then range and statistics are others'
        kept = [name for name in kept if name not in PIXELS]
    pairs = compare_flags(known, ours, kept)
    if pairs:
        log.warning(
            f"warning: {source} was trained with {', '.join(before for before, _ in pairs)} and is "
            f"fine-tuned with {', '.join(now for _, now in pairs)}: give the flags of its training, unless "
            "the change is meant"
        )


def refuse_other_classes(trained: TrainedClassifier, classes: Sequence[str], where: str) -> None:
    """The names behind the labels must be those behind the logits, as far as both are
    known. `where`: parameter and folder.
    """
    if len(classes) != trained.nb_classes:
        hint = "; for ImageNet-A or -R add `robust_test`" if set(classes) <= set(synsets()) else ""
        raise UserError(
            f"{trained.source} tells {trained.nb_classes} classes apart, {where} has {len(classes)}{hint}"
        )
    if trained.classes and list(classes) != trained.classes:
        raise UserError(
            f"{where} has other classes than {trained.source}: "
            f"{describe_difference(trained.classes, classes)}"
        )


def refuse_other_than_imagenet(trained: TrainedClassifier, robust: RobustSet) -> None:
    """UserError unless the classifier tells ImageNet-1k's classes apart: the folders of
    the robustness sets are classes of these.
    """
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
    """Where two lists of class names differ first, in words."""
    if len(theirs) != len(ours):
        return f"it has {len(theirs)} classes, here are {len(ours)}"
    number, (one, other) = next(
        (i, pair) for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]
    )
    return f"its class {number} is '{one}', here it is '{other}'"


def refuse_resuming_other_classes(state: Mapping[str, Any], classes: Sequence[str], way_out: str) -> None:
    """A resumed run must name its classes as before; `state`: of the stage, which in
    older checkpoints holds no names.
    """
    theirs = state.get("classes") or classes
    if classes and list(theirs) != list(classes):
        raise UserError(
            "the checkpoint to resume was trained on other classes: "
            f"{describe_difference(theirs, classes)}; give {way_out}, or start again from these weights with "
            "`finetune` and another `output_dir`"
        )
