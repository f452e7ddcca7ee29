"""Weights for timm and Hugging Face, or from them: python export_checkpoint.py
--checkpoint ft.pth --to timm --output out

Sources are our checkpoints, published weights, and the models of both libraries;
docs/export.md has examples.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import arguments
import modeling_finetune
import modeling_pretrain
import pretrained
from checkpoint_io import checkpoints, huggingface_format, remapping, timm_format, weight_source
from checkpoint_io.remapping import summarize_names
from checkpoint_io.weight_formats import INDEX, TABLE, ConvertedWeights, Preprocessing
from checkpoint_io.weight_source import WEIGHT_FILES, Source
from data_pipeline.imagenet_classes import in_words, synsets
from errors import UserError, pick, report_user_errors
from layers.rel_pos_bias import as_pair
from runtime import distributed
from runtime.distributed import log
from transforms import default_crop_pct, normalization
from vit_backbone import SIZES, Trunk, Variant

SUFFIXES = (".safetensors", ".pth")
NAMES_OF = {"ours": "our names", "timm": "timm's names", "huggingface": "Hugging Face's names"}
# What only concerns a transformer, not a file that is passed on as it is.
TRANSFORMER_FLAGS = (
    "architecture",
    "class_names",
    "model",
    "num_heads",
    "input_size",
    "imagenet_default_mean_and_std",
)


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser(
        "Weights for other libraries, and from them",
        "--checkpoint finetuned/checkpoint.pth --to timm --output exported",
    )
    parser.add_argument(
        "--checkpoint",
        type=arguments.expand_home,
        required=True,
        help="what to convert: a file, a folder of timm or Hugging Face, a URL or a published name",
    )
    parser.add_argument(
        "--from",
        dest="source_format",
        default="auto",
        choices=("auto", "ours", "timm", "huggingface"),
        help="whose names it has",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(WRITERS),
        help="safetensors: our names (.pth by the output's name)",
    )
    parser.add_argument(
        "--output",
        type=arguments.expand_home,
        required=True,
        help="safetensors: a file; timm: a file or a folder; huggingface: a folder",
    )
    parser.add_argument(
        "--architecture",
        default="auto",
        choices=("auto", *huggingface_format.ARCHITECTURES),
        help="Hugging Face's class; auto: the one that has the checkpoint's head",
    )
    parser.add_argument(
        "--ema", action="store_true", help=("the moving average of the weights (--model_ema of fine-tuning)")
    )
    parser.add_argument(
        "--class_names",
        type=arguments.expand_home,
        default=None,
        help="imagenet-1k, or a file: one name a line, or a JSON list or {id: name}",
    )
    parser.add_argument(
        "--input_size",
        type=arguments.image_size,
        default=None,
        help="side, or height x width; default: the model's",
    )
    parser.add_argument(
        "--model", default=None, help=("the model that the file must hold; default: read from the shapes")
    )
    parser.add_argument(
        "--num_heads",
        type=arguments.small_count,
        default=None,
        help="for unknown sizes without position bias",
    )
    parser.add_argument(
        "--imagenet_default_mean_and_std",
        action="store_true",
        help="the checkpoint's own setting if it has one",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if args.architecture != "auto" and args.to != "huggingface":
        raise UserError(
            f"--architecture names a class of Hugging Face; --to {args.to} has none: leave it out"
        )
    if args.model is not None:
        pick(variants(), args.model, "model")
    if args.to == "safetensors" and output.suffix not in SUFFIXES:
        raise UserError(f"--output {args.output}: give the file a name that ends in {' or '.join(SUFFIXES)}")
    if args.to == "huggingface" and (output.suffix in SUFFIXES or output.is_file()):
        raise UserError(f"--output {args.output}: Hugging Face's models are folders; name a folder")
    if args.to == "timm" and output.suffix not in SUFFIXES and output.is_file():
        raise UserError(
            f"--output {args.output} is a file: name a folder, or a file that ends in {' or '.join(SUFFIXES)}"
        )
    if output.exists() and os.path.exists(args.checkpoint) and output.samefile(args.checkpoint):
        raise UserError(f"--output {args.output} would overwrite --checkpoint: name another place")


# ── The model ──


class Model(NamedTuple):
    """`settings`: the arguments of VisionTransformer; `vocab_size` 0: without a head for
    masked images; `name`: of --model.
    """

    weights: dict[str, Tensor]
    settings: dict[str, Any]
    vocab_size: int
    name: str | None
    prepared: Preprocessing
    classes: list[str] | None
    flags: dict[str, Any]
    left_out: list[str]
    notes: list[str]


def open_model(source: Source, args: argparse.Namespace) -> Model:
    """Build the model that the weights are of and load them: what does not fit together is found here."""
    weights, external = source.weights, source.external
    row = SIZES[variants()[args.model].size] if args.model else None
    heads = args.num_heads or external.num_heads
    if heads is None and row is not None and not any(key.endswith(TABLE) for key in weights):
        heads = row.num_heads
    try:
        settings = pretrained.infer_architecture(weights, source.flags, heads)
    except UserError as error:
        raise UserError(f"--checkpoint {args.checkpoint}: {error}") from None
    if args.input_size is not None:
        settings["img_size"] = as_pair(args.input_size)
    settings["num_classes"] = len(weights["head.weight"]) if "head.weight" in weights else 0
    vocab_size = len(weights["lm_head.weight"]) if "lm_head.weight" in weights else 0
    name = name_of(settings, weights, args)
    try:
        model = build(settings, vocab_size, weights)
    except ValueError as error:
        raise UserError(f"--input_size: {error}") from None
    left_out, notes = load(model, weights, args)
    classes = read_class_names(args.class_names, settings["num_classes"]) or source.classes
    if classes is not None and len(classes) != settings["num_classes"]:
        classes = None  # of another head than the one in the file
    prepared = preparation(source, settings, args)
    return Model(
        model.state_dict(), settings, vocab_size, name, prepared, classes, source.flags, left_out, notes
    )


def load(model: Trunk, weights: dict[str, Tensor], args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Load the weights; returns the keys that are no part of the model, and what else there is to say."""
    fitting, missing = remapping.load_remapped(model, weights)
    notes = []
    if (
        set(missing) in ({"norm.weight", "norm.bias"}, {"fc_norm.weight", "fc_norm.bias"})
        and "head.weight" not in fitting
    ):
        # a backbone for segmentation
        notes.append("the last norm, which the file lacks, stays as it is built: 1 and 0")
    elif missing:
        raise UserError(f"--checkpoint {args.checkpoint} is incomplete: it lacks {summarize_names(missing)}")
    try:
        remapping.refuse_misfits(weights, model, fitting)
    except UserError as error:
        raise UserError(f"--checkpoint {args.checkpoint} is not of one kind of model: {error}") from None
    left_out = [key for key in weights if key not in fitting and not key.endswith(INDEX)]
    before, after = remapping.infer_patch_grid(weights), model.patch_embed.patch_shape
    if before not in (None, after):
        notes.append(
            f"positions were resized from {before[0]} x {before[1]} to {after[0]} x {after[1]} patches"
        )
    return left_out, notes


def build(settings: dict[str, Any], vocab_size: int, weights: dict[str, Tensor]) -> Trunk:
    if not vocab_size:
        return modeling_finetune.VisionTransformer(**settings)
    common = {key: value for key, value in settings.items() if key not in ("num_classes", "use_mean_pooling")}
    head_layers = len({key.split(".")[1] for key in weights if key.startswith("cls_pt_layers.")})
    if not head_layers:
        return modeling_pretrain.VisionTransformerForMaskedImageModeling(vocab_size=vocab_size, **common)
    shared = "cls_pt_lm_head.weight" not in weights
    return modeling_pretrain.VisionTransformerForMaskedImageModelingCLS(
        vocab_size=vocab_size, head_layers=head_layers, shared_lm_head=shared, early_layers=1, **common
    )


def variants() -> dict[str, Variant]:
    return {**modeling_pretrain.MODELS, **modeling_finetune.MODELS}


def name_of(settings: dict[str, Any], weights: dict[str, Tensor], args: argparse.Namespace) -> str | None:
    """Our name of the model: the one of its kind, size and patches whose images are
    nearest in size; None if there is none.
    """
    make = {key: settings[key] for key in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    sizes = [size for size, row in SIZES.items() if row._asdict() == make]
    kind = ("lm_head.weight" in weights, "cls_pt_layers.0.norm1.weight" in weights)
    fits = {
        name: abs(variant.img_size - settings["img_size"][0])
        for name, variant in variants().items()
        if variant.size in sizes and variant.patch_size == settings["patch_size"]
        if kind == (name in modeling_pretrain.MODELS, name.endswith("_cls_pt"))
    }
    if args.model is not None and args.model not in fits:
        holds = " or ".join(fits) or "a size that has no name here"
        raise UserError(f"--model {args.model} is not what {args.checkpoint} holds: {holds}")
    return args.model or min(fits, key=lambda name: fits[name], default=None)


def preparation(source: Source, settings: dict[str, Any], args: argparse.Namespace) -> Preprocessing:
    if source.external.prepared is not None:
        return source.external.prepared
    mean, std = normalization(
        source.flags.get("imagenet_default_mean_and_std", args.imagenet_default_mean_and_std)
    )
    return Preprocessing(mean, std, source.flags.get("crop_pct") or default_crop_pct(settings["img_size"]))


def read_class_names(given: str | None, count: int) -> list[str] | None:
    """--class_names, as many as the classifier has classes."""
    if given is None:
        return None
    if not count:
        raise UserError("--class_names: the checkpoint holds no classifier to name the classes of")
    if given == "imagenet-1k":
        names = synsets()
    else:
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--class_names {given}: cannot be read ({error}); give imagenet-1k or a text file"
            ) from None
        try:
            content = json.loads(text)
            pairs = (
                sorted(content.items(), key=lambda pair: int(pair[0]))
                if isinstance(content, dict)
                else enumerate(content)
            )
            names = [str(name) for _, name in pairs]
        except (ValueError, TypeError, RecursionError):
            names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) != count:
        raise UserError(f"--class_names {given} has {len(names)} names, the classifier {count} classes")
    return names


# ── Writing ──


class Written(NamedTuple):
    """For the report: the files, what became of the weights, and how to open them."""

    files: list[Path]
    converted: ConvertedWeights
    opened_by: list[str]


def write_ours(model: Model, args: argparse.Namespace) -> Written:
    """--to safetensors: our names, with flags by which our scripts rebuild the model."""
    path = Path(args.output)
    flags = {**our_flags(model), **model.flags, "input_size": as_flag(model.settings["img_size"])}
    weight_source.save_weights(path, model.weights, checkpoints.to_plain_data(flags), model.classes)
    notes = [] if model.name else ["no --model builds it: vit_backbone.SIZES has no row of this size"]
    if model.prepared[:2] not in (normalization(True), normalization(False)):
        notes.append("our scripts know no such mean and std: they will use 0.5, or ImageNet's with the flag")
    by = f"--finetune {path} (run_class_finetuning), --checkpoint {path} (visualize_attention)"
    return Written([path], ConvertedWeights(model.weights, [], notes), [by])


def our_flags(model: Model) -> dict[str, Any]:
    s = model.settings
    flags = {
        "model": model.name,
        "rel_pos_bias": s["use_rel_pos_bias"] or s["use_shared_rel_pos_bias"],
        "abs_pos_emb": s["use_abs_pos_emb"],
        "layer_scale_init_value": s["init_values"],
        "imagenet_default_mean_and_std": model.prepared[:2] == normalization(True),
    }
    if model.vocab_size:
        return flags | {"codebook_size": model.vocab_size}
    head = {
        "nb_classes": s["num_classes"],
        "use_mean_pooling": s["use_mean_pooling"],
        "qkv_bias": s["qkv_bias"],
    }
    return flags | head | {"crop_pct": weight_source.to_crop_flag(model.prepared.crop_pct, s["img_size"])}


def as_flag(size: tuple[int, int]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else size


def write_timm(model: Model, args: argparse.Namespace) -> Written:
    """--to timm: a folder as on timm's hub, or a file with its config beside it."""
    path = Path(args.output)
    is_file = path.suffix in SUFFIXES
    converted = timm_format.to_timm(model.weights)
    config = timm_format.make_timm_config(model.settings, model.prepared, model.classes)
    weights, facts = (
        (path, path.with_suffix(".json")) if is_file else (path / WEIGHT_FILES[0], path / "config.json")
    )
    weight_source.save_weights(weights, converted.weights)
    write_json(facts, config)
    by = f'timm.create_model("local-dir:{path}", pretrained=True)'
    if is_file:
        settings = f'**json.load(open("{facts}"))["model_args"]'
        by = f'timm.create_model("{config["architecture"]}", checkpoint_path="{path}", {settings})'
    return Written([weights, facts], converted, [by])


def write_huggingface(model: Model, args: argparse.Namespace) -> Written:
    """--to huggingface: a folder for from_pretrained."""
    folder = Path(args.output)
    codes = 0 if predicts_pixels(model) else model.vocab_size
    heads = {
        huggingface_format.CLASSIFIER: model.settings["num_classes"],
        huggingface_format.MASKED_IMAGE: codes,
    }
    own = next((name for name, size in heads.items() if size), huggingface_format.BACKBONE)
    architecture = own if args.architecture == "auto" else args.architecture
    if not heads.get(architecture, 1):
        raise UserError(f"--architecture {architecture}: {args.checkpoint} has no such head; {own} fits it")
    drop_path = model.flags.get("drop_path", 0.1)
    names = [in_words(name) for name in model.classes] if model.classes else None
    config = huggingface_format.make_huggingface_config(
        model.settings, architecture, model.vocab_size, drop_path, names
    )
    preprocessor = huggingface_format.make_huggingface_preprocessor(
        model.settings["img_size"][0], model.prepared
    )
    converted = huggingface_format.to_huggingface(model.weights, architecture)
    files = [folder / name for name in (WEIGHT_FILES[0], "config.json", "preprocessor_config.json")]
    weight_source.save_weights(files[0], converted.weights)
    write_json(files[1], config)
    write_json(files[2], preprocessor)
    by = [
        f'transformers.{architecture}.from_pretrained("{folder}")',
        f'transformers.AutoImageProcessor.from_pretrained("{folder}")',
    ]
    return Written(files, converted, by)


WRITERS = {"safetensors": write_ours, "timm": write_timm, "huggingface": write_huggingface}


def predicts_pixels(model: Model) -> bool:
    """--target pixels of pretraining, BEiT's ablation: such a head gives no codes."""
    return model.flags.get("target") == "pixels"


def write_json(path: Path, content: dict[str, Any]) -> None:
    checkpoints.write_json(path.parent, path.name, content)


def pass_on(source: Source, args: argparse.Namespace) -> str:
    """A tokenizer or a segmentation model: our names only, all tensors as they are."""
    held = summarize_names(list(source.weights))
    if args.to != "safetensors":
        raise UserError(
            f"--to {args.to}: {args.to} has no such model as {args.checkpoint} ({held}); "
            "only --to safetensors"
        )
    given = [name for name in arguments.changed_flags(get_parser(), args) if name in TRANSFORMER_FLAGS]
    if given:
        raise UserError(
            f"--{given[0]} concerns classifiers and pretrained transformers; {args.checkpoint} is "
            "neither: leave it out"
        )
    weight_source.save_weights(Path(args.output), source.weights, checkpoints.to_plain_data(source.flags))
    size = checkpoints.count_bytes(source.weights) / 2**20
    return f"written    {args.output} ({len(source.weights)} tensors, {size:.1f} MiB), as they were: {held}"


def report(source: Source, model: Model, written: Written) -> list[str]:
    weights, *others = written.files
    size = checkpoints.count_bytes(written.converted.weights) / 2**20
    s, prepared = model.settings, model.prepared
    head = f"{s['num_classes']} classes" if s["num_classes"] else "no head"
    if model.vocab_size:
        head = f"{model.vocab_size} {'values of pixels' if predicts_pixels(model) else 'codes'}"
    values = [", ".join(f"{value:g}" for value in triple) for triple in prepared[:2]]
    lines = [
        ("read", f"{source.path}, {NAMES_OF[source.library]}"),
        ("written", f"{weights} ({len(written.converted.weights)} tensors, {size:.1f} MiB)"),
        *(("", str(other)) for other in others),
        (
            "model",
            f"{model.name or 'of no known size'}: {s['embed_dim']} wide, {s['depth']} deep, "
            f"{s['num_heads']} heads",
        ),
        ("", f"patches of {s['patch_size']} in {s['img_size'][0]} x {s['img_size'][1]} pixels, {head}"),
        ("images", f"crop {prepared.crop_pct:g}, mean {values[0]}, std {values[1]}"),
    ]
    if s["num_classes"]:
        lines.append(("classes", brief_classes(model.classes)))
    notes = [*model.notes, *written.converted.notes]
    lines += [("converted" if number == 0 else "", note) for number, note in enumerate(notes)]
    lines.append(("left out", summarize_names([*model.left_out, *written.converted.dropped])))
    lines += [("open with" if number == 0 else "", call) for number, call in enumerate(written.opened_by)]
    return [f"{title:11}{text}" for title, text in lines]


def brief_classes(names: list[str] | None) -> str:
    if names is None:
        return "without names (--class_names gives them)"
    return "; ".join(map(in_words, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    check(args)
    distributed.set_up_logging(0)
    source = weight_source.read_weights(args.checkpoint, args.source_format, args.ema)
    whole = any(key.startswith(("quantize.", "decode_head.")) for key in source.weights)
    if whole and source.library == "ours":
        log.info(pass_on(source, args))
        return
    model = open_model(source, args)
    for line in report(source, model, WRITERS[args.to](model, args)):
        log.info(line)


if __name__ == "__main__":
    main()
