"""Weights for timm, Hugging Face and ONNX, or from the first two.

Sources are our checkpoints, published weights, and the models of both libraries;
docs/export.md has examples.
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import arguments
import modeling_finetune
import pretrained
from checkpoint_io import (
    checkpoints,
    export,
    hub,
    huggingface_format,
    model_card,
    onnx_format,
    weight_source,
)
from checkpoint_io.class_names import read_class_names
from checkpoint_io.export import FILE_ENDINGS, ExportableModel, ExportedFiles
from checkpoint_io.remapping import summarize_names
from checkpoint_io.weight_formats import ConvertedWeights
from checkpoint_io.weight_source import WeightSource
from data_pipeline.imagenet_classes import in_words
from errors import UserError, pick, report_user_errors
from flags.images import add_opened_model_flags
from layers.rel_pos_bias import as_pair
from pretrained import ModelHints
from runtime import terminal
from runtime.terminal import log

FORMATS = ("safetensors", "timm", "huggingface", "onnx")
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
        "Convert weights for other libraries, and from them",
        "finetuned/checkpoint.pth --to timm --output exported",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    what = "what to convert: a file, a folder of timm or Hugging Face, a URL, a published name or a hub id"
    source.add_argument("checkpoint", nargs="?", type=arguments.expand_home, help=what)
    source.add_argument(
        "--checkpoint", dest="checkpoint_flag", type=arguments.expand_home, help="the same, as a flag"
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
        choices=FORMATS,
        help="safetensors: our names (.pth by the output's name); onnx: checked with onnxruntime",
    )
    parser.add_argument(
        "--output",
        type=arguments.expand_home,
        required=True,
        help="safetensors, onnx: a file; timm: a file or a folder; huggingface: a folder",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="OWNER/NAME",
        default=None,
        help="upload the folder to this repository of Hugging Face's hub (made private where it is new), "
        "with a model card of what was measured",
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
        help="imagenet-1k, or a file: one name per line, or a JSON list or {id: name}",
    )
    parser.add_argument(
        "--model", default=None, help=("the model that the file must hold; default: read from the shapes")
    )
    add_opened_model_flags(parser)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if args.architecture != "auto" and args.to != "huggingface":
        raise UserError(
            f"--architecture names a class of Hugging Face; --to {args.to} has none: leave it out"
        )
    if args.model is not None:
        pick(pretrained.list_variants(), args.model, "model")
    if args.to == "safetensors" and output.suffix not in FILE_ENDINGS:
        raise UserError(
            f"--output {args.output}: give the file a name that ends in {' or '.join(FILE_ENDINGS)}"
        )
    if args.to == "onnx":
        if output.suffix != ".onnx" or output.is_dir():
            raise UserError(f"--output {args.output}: give the file a name that ends in .onnx")
        onnx_format.require_packages()
    if args.push_to_hub is not None and (
        args.to not in ("timm", "huggingface") or output.suffix in FILE_ENDINGS
    ):
        raise UserError(
            "--push_to_hub uploads a folder: give --to huggingface or --to timm, and a folder as --output"
        )
    if args.to == "huggingface" and (output.suffix in FILE_ENDINGS or output.is_file()):
        raise UserError(f"--output {args.output}: Hugging Face's models are folders; name a folder")
    if args.to == "timm" and output.suffix not in FILE_ENDINGS and output.is_file():
        raise UserError(
            f"--output {args.output} is a file: name a folder, or a file that ends in "
            f"{' or '.join(FILE_ENDINGS)}"
        )
    if output.exists() and os.path.exists(args.checkpoint) and output.samefile(args.checkpoint):
        raise UserError(f"--output {args.output} would overwrite --checkpoint: name another place")


def write_unchanged(source: WeightSource, args: argparse.Namespace) -> str:
    """A tokenizer or a segmentation model: our names only, all tensors as they are."""
    held = summarize_names(list(source.weights))
    if args.to != "safetensors":
        raise UserError(
            f"--to {args.to}: {args.to} has no such model as {args.checkpoint} ({held}); only --to "
            "safetensors"
        )
    given = [name for name in arguments.changed_flags(get_parser(), args) if name in TRANSFORMER_FLAGS]
    if given:
        raise UserError(
            f"--{given[0]} concerns classifiers and pretrained transformers; {args.checkpoint} is neither: "
            "leave it out"
        )
    weight_source.save_weights(Path(args.output), source.weights, checkpoints.to_plain_data(source.flags))
    size = checkpoints.count_bytes(source.weights) / 2**20
    return f"written    {args.output} ({len(source.weights)} tensors, {size:.1f} MiB), as they were: {held}"


def describe_export(source: WeightSource, model: ExportableModel, written: ExportedFiles) -> list[str]:
    """What was read, what it is, and what became of it, in lines."""
    weights, *others = written.files
    size = checkpoints.count_bytes(written.converted.weights) / 2**20
    s, prepared = model.settings, model.prepared
    head = f"{s['num_classes']} classes" if s["num_classes"] else "no head"
    if model.vocab_size:
        head = f"{model.vocab_size} {'values of pixels' if model.predicts_pixels else 'codes'}"
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
        *([] if model.pixels.is_rgb8 else [("", f"{model.pixels}, which becomes 0 to 1 before that")]),
    ]
    if s["num_classes"]:
        lines.append(("classes", summarize_classes(model.classes)))
    notes = [*model.notes, *written.converted.notes]
    lines += [("converted" if number == 0 else "", note) for number, note in enumerate(notes)]
    lines.append(("left out", summarize_names([*model.dropped, *written.converted.dropped])))
    lines += [("open with" if number == 0 else "", call) for number, call in enumerate(written.opened_by)]
    return [f"{title:11}{text}" for title, text in lines]


def summarize_classes(names: list[str] | None) -> str:
    if names is None:
        return "without names (--class_names gives them)"
    return "; ".join(map(in_words, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    args = args.replace(checkpoint=args.checkpoint or args.checkpoint_flag)
    check_flags(args)
    terminal.set_up_logging(0)
    source = weight_source.read_weights(args.checkpoint, args.source_format, args.ema)
    whole = any(key.startswith(("quantize.", "decode_head.")) for key in source.weights)
    if whole and source.library == "ours":
        log.info(write_unchanged(source, args))
        return
    model = open_model(source, args)
    written = write_model(model, args)
    for line in describe_export(source, model, written):
        log.info(line)
    if args.push_to_hub is not None:
        push(source, model, written, args)


def open_model(source: WeightSource, args: argparse.Namespace) -> ExportableModel:
    hints = ModelHints(args.model, args.num_heads, args.input_size, args.imagenet_default_mean_and_std)
    model = pretrained.open_model(source, args.checkpoint, hints)
    names = read_class_names(args.class_names, model.settings["num_classes"])
    return model if names is None else model._replace(classes=names)


def write_model(model: ExportableModel, args: argparse.Namespace) -> ExportedFiles:
    output = Path(args.output)
    if args.to == "onnx":
        return write_onnx(model, output)
    if args.to == "timm":
        return export.write_timm(model, output)
    if args.to == "huggingface":
        return export.write_huggingface(
            model, output, None if args.architecture == "auto" else args.architecture
        )
    return export.write_ours(model, output)


def write_onnx(model: ExportableModel, output: Path) -> ExportedFiles:
    """A classifier gives its logits, a pretrained transformer its tokens after the last
    norm, CLS first.
    """
    network = pretrained.build_network(model)
    classifies = model.settings["num_classes"] > 0
    image = (model.settings["in_chans"], *as_pair(model.settings["img_size"]))
    prepared = {**model.prepared._asdict(), "image_range": model.pixels.image_range}
    facts = {name: json.dumps(value) for name, value in {**prepared, "classes": model.classes}.items()}
    name = "logits" if classifies else "tokens"
    files, difference = onnx_format.write_onnx(
        network if classifies else modeling_finetune.AllTokens(network), image, output, name, facts
    )
    notes = [f"onnxruntime computes the same to {difference:.1g}, with batches of any size"]
    call = f'onnxruntime.InferenceSession("{output}").run(None, {{"image": images}})[0]  # {name}'
    kept = {key: value for key, value in model.weights.items() if key in network.state_dict()}
    dropped = [key for key in model.weights if key not in kept]
    return ExportedFiles(files, ConvertedWeights(kept, dropped, notes), [call])


def push(
    source: WeightSource, model: ExportableModel, written: ExportedFiles, args: argparse.Namespace
) -> None:
    """--push_to_hub: the folder, with a README.md of what was measured."""
    folder = Path(args.output)
    measured = model_card.find_measurements(source.path, args.checkpoint)
    card = model_card.make_card(model, args.to, args.push_to_hub, measured)
    readme = checkpoints.write_text(folder, "README.md", card)
    address = hub.push_folder(folder, [*written.files, readme], args.push_to_hub)
    log.info(f"pushed     {address}")


if __name__ == "__main__":
    main()
