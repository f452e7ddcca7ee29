"""A transformer written to files that our scripts, timm or Hugging Face's transformers
open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from checkpoint_io import checkpoints, huggingface_format, timm_format, weight_source
from checkpoint_io.hub import WEIGHT_FILES
from checkpoint_io.weight_formats import ConvertedWeights, Preprocessing
from data_pipeline.imagenet_classes import in_words
from data_pipeline.pixel_format import PixelFormat
from errors import ParameterError
from transforms import normalization

FILE_ENDINGS = (".safetensors", ".pth")


class ExportableModel(NamedTuple):
    """A transformer under our names. `source` names its file in messages; `name` is the
    one of its builder, None where there is none; `settings` are the arguments of
    VisionTransformer; `vocab_size` 0: without a head for masked images; `flags`: of its
    training; `dropped`: keys of the file that are no part of it.
    """

    source: str
    name: str | None
    weights: dict[str, Tensor]
    settings: dict[str, Any]
    vocab_size: int
    prepared: Preprocessing
    classes: list[str] | None
    flags: dict[str, Any]
    dropped: list[str]
    notes: list[str]

    @property
    def pixels(self) -> PixelFormat:
        """Of its images."""
        return PixelFormat.of_flags({**self.flags, "in_chans": self.settings["in_chans"]})

    @property
    def predicts_pixels(self) -> bool:
        """Pretrained with `target` pixels, BEiT's ablation: such a head gives no
        codes.
        """
        return self.flags.get("target") == "pixels"


class ExportedFiles(NamedTuple):
    """The files, the one of the weights first; what became of the weights; how to open
    them.
    """

    files: list[Path]
    converted: ConvertedWeights
    opened_by: list[str]


def write_ours(model: ExportableModel, path: Path) -> ExportedFiles:
    """A file with our names, and with flags by which our scripts rebuild the model."""
    size = model.settings["img_size"]
    flags = {
        **make_training_flags(model),
        **model.flags,
        "input_size": size[0] if size[0] == size[1] else size,
    }
    weight_source.save_weights(path, model.weights, checkpoints.to_plain_data(flags), model.classes)
    notes = [] if model.name else ["no `model` builds it: vit_backbone.SIZES has no row of this size"]
    by = f"`finetune` {path} (run_class_finetuning), `checkpoint` {path} (visualize_attention)"
    return ExportedFiles([path], ConvertedWeights(model.weights, [], notes), [by])


def make_training_flags(model: ExportableModel) -> dict[str, Any]:
    """The flags of a training that builds such a model."""
    s = model.settings
    flags = {
        "model": model.name,
        "rel_pos_bias": s["use_rel_pos_bias"] or s["use_shared_rel_pos_bias"],
        "abs_pos_emb": s["use_abs_pos_emb"],
        "layer_scale_init_value": s["init_values"],
        "imagenet_default_mean_and_std": model.prepared[:2] == normalization(True),
        "in_chans": s["in_chans"],
    }
    if model.prepared[:2] not in (normalization(True), normalization(False)):
        flags["mean_std"] = [*model.prepared.mean, *model.prepared.std]
    if model.vocab_size:
        return flags | {"codebook_size": model.vocab_size}
    head = {
        "nb_classes": s["num_classes"],
        "use_mean_pooling": s["use_mean_pooling"],
        "qkv_bias": s["qkv_bias"],
    }
    return flags | head | {"crop_pct": weight_source.to_crop_flag(model.prepared.crop_pct, s["img_size"])}


def write_timm(model: ExportableModel, path: Path) -> ExportedFiles:
    """A folder as on timm's hub, or a file with its config beside it."""
    is_file = path.suffix in FILE_ENDINGS
    converted = timm_format.to_timm(model.weights)
    config = timm_format.make_timm_config(
        model.settings, model.prepared, model.classes, model.pixels.image_range
    )
    weights, facts = (
        (path, path.with_suffix(".json")) if is_file else (path / WEIGHT_FILES[0], path / "config.json")
    )
    weight_source.save_weights(weights, converted.weights)
    checkpoints.write_json(facts.parent, facts.name, config)
    by = f'timm.create_model("local-dir:{path}", pretrained=True)'
    if is_file:
        settings = f'**json.load(open("{facts}"))["model_args"]'
        by = f'timm.create_model("{config["architecture"]}", checkpoint_path="{path}", {settings})'
    return ExportedFiles([weights, facts], converted, [by])


def write_huggingface(model: ExportableModel, folder: Path, architecture: str | None = None) -> ExportedFiles:
    """A folder for from_pretrained. `architecture`: Hugging Face's class, by default
    the one that has the model's head.
    """
    codes = 0 if model.predicts_pixels else model.vocab_size
    heads = {
        huggingface_format.CLASSIFIER: model.settings["num_classes"],
        huggingface_format.MASKED_IMAGE: codes,
    }
    own = next((name for name, size in heads.items() if size), huggingface_format.BACKBONE)
    architecture = architecture or own
    if not heads.get(architecture, 1):
        raise ParameterError(f"`architecture` {architecture}: {model.source} has no such head; {own} fits it")
    drop_path = model.flags.get("drop_path", 0.1)
    names = [in_words(name) for name in model.classes] if model.classes else None
    config = huggingface_format.make_huggingface_config(
        model.settings, architecture, model.vocab_size, drop_path, names
    )
    preprocessor = huggingface_format.make_huggingface_preprocessor(
        model.settings["img_size"][0], model.prepared, model.pixels.image_range
    )
    converted = huggingface_format.to_huggingface(model.weights, architecture)
    if model.pixels.in_chans != 3 and model.pixels.image_range is None:
        converted.notes.append("rescale_factor is that of 8 bits; for 16-bit files write 1 / 65535 there")
    files = [folder / name for name in (WEIGHT_FILES[0], "config.json", "preprocessor_config.json")]
    weight_source.save_weights(files[0], converted.weights)
    checkpoints.write_json(folder, files[1].name, config)
    checkpoints.write_json(folder, files[2].name, preprocessor)
    by = [
        f'transformers.{architecture}.from_pretrained("{folder}")',
        f'transformers.AutoImageProcessor.from_pretrained("{folder}")',
    ]
    return ExportedFiles(files, converted, by)
