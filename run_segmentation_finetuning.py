"""Semantic segmentation: fine-tune, evaluate, label images (docs/segmentation.md)."""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import functools
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

import arguments
import engine
import modeling_segmentation
import run_state
from checkpoint_io import checkpoints, weight_source
from checkpoint_io.weight_source import WeightSource
from data_pipeline.image_lists import find_images_or_file
from data_pipeline.samplers import Loader
from engine_for_segmentation import Scores, SegmentationStage
from errors import UserError, report_user_errors
from evaluation.run_flags import RunFlags, take_training_flags
from evaluation.trained_classifier import warn_of_other_pretraining
from flags.images import mean_and_std
from flags.pixel_format import image_endings, pixel_format, resolve_pixel_flags
from flags.segmentation import (
    build_evaluation_view,
    build_sliding_window,
    build_training_view,
    check_batch_norm,
    get_parser,
    idle_flags,
    parse_flags,
)
from optim_factory import create_optimizer, decayed_layers
from runtime import distributed
from runtime.terminal import log
from schedules import build_poly_schedule
from segmentation import trained_segmenter
from segmentation.classes import ClassSettings, find_classes, read_class_list, read_palette
from segmentation.image_mask_pairs import SegmentationFiles, find_pairs, normalize
from segmentation.joint_views import size_of
from segmentation.mask_files import Pair
from segmentation.sliding_window import predict
from visualization import drawing
from visualization.inputs import read_or_leave_out, save_picture


def build(args: arguments.Flags) -> engine.Trainer:
    """The run that the flags describe, ready for its first step."""
    # ── Setup ──
    parser = get_parser()
    run = run_state.start_run(parser, args)
    arguments.warn_of_idle_flags(parser, args, idle_flags(args))
    start = weight_source.read_weights(args.finetune, origin="`finetune`") if args.finetune else None

    # ── Data ──
    pairs = find_pairs(args.data_path, train=True, image_endings=image_endings(args))
    args = resolve_pixels(args, run, pairs, start)
    classes = find_classes(class_settings(args), pairs)
    log.info(f"classes    {len(classes)}: {', '.join(classes[:6])}{' ...' if len(classes) > 6 else ''}")
    check_batch_norm(args, run.launch.world_size)
    global_batch = args.batch_size * run.launch.world_size * args.update_freq
    passes = math.ceil(min(args.steps_per_epoch, args.max_steps) * global_batch / len(pairs))
    dataset = build_dataset(args, True, classes, passes)
    dataset.check_that_classes_occur()
    data = run_state.build_training_data(dataset, run)
    validation = None
    if not args.disable_eval:
        held_out = build_dataset(args, False, classes)
        held_out.check_masks()  # now, not after the first epoch
        validation = build_validation_loader(args, run, held_out)
        log.info(f"evaluation {len(held_out):,} images")

    # ── Model ──
    model: nn.Module = modeling_segmentation.create_model(
        args.model,
        len(classes),
        args.input_size,
        in_chans=args.in_chans,
        drop_path_rate=args.drop_path,
        init_values=args.layer_scale_init_value,
        use_abs_pos_emb=args.abs_pos_emb,
        use_rel_pos_bias=args.rel_pos_bias,
    )
    modeling_segmentation.set_head_dropout(model, args.head_drop)
    if start is not None:
        trained_segmenter.load_pretrained(model, start, f"--finetune {args.finetune}")  # type: ignore[arg-type]
        ours = collect_flags(parser, args)
        warn_of_other_pretraining(start.weights, start.flags, ours, f"`finetune` {args.finetune}")
    model.to(run.device)
    if run.device.type == "cuda" and run.launch.world_size > 1:  # torch's fused one, where there is one
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    stage = build_stage(args, run, classes, validation)

    # ── Optimizer: deeper layers learn slower ──
    layers = decayed_layers(args.layer_decay, model.get_num_layers(), "backbone.")  # type: ignore[operator]
    optimizer = create_optimizer(args, model, *layers)
    schedule = build_poly_schedule(
        args.lr, args.min_lr, args.max_steps, args.warmup_steps, args.poly_power, args.weight_decay
    )
    state = run_state.new_state(model, optimizer, run, args.model)

    # ── Resume ──
    trainer = engine.Trainer(run, stage, data, schedule, state)
    trainer.resume()
    trainer.compile()
    return trainer


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_flags(argv)
    if args.eval or args.predict:
        use_trained_model(args)
    else:
        build(args).fit()
    distributed.stop()


def resolve_pixels(
    args: arguments.Flags, run: run_state.Run, pairs: Sequence[Pair], start: WeightSource | None
) -> arguments.Flags:
    """Numbers for --image_range and --mean_std auto: those of --finetune, else of the
    training images.
    """
    images = [(pair.image, None) for pair in pairs]
    known = [] if start is None else [(start.flags, f"--finetune {args.finetune}")]
    return resolve_pixel_flags(args, run, lambda _: images, known)


def class_settings(args: argparse.Namespace) -> ClassSettings:
    folder = args.data_path or args.eval_data_path
    return ClassSettings(args.class_names, folder, args.nb_classes, args.reduce_zero_label)


def build_dataset(
    args: argparse.Namespace, train: bool, classes: Sequence[str], passes: int = 1
) -> SegmentationFiles:
    """The training pairs of --data_path, augmented, `passes` times over; or the
    validation pairs, of --eval_data_path when it is given, as they are.
    """
    elsewhere = not train and args.eval_data_path
    folder, origin = (
        (args.eval_data_path, "`eval_data_path`") if elsewhere else (args.data_path, "`data_path`")
    )
    pairs = find_pairs(folder, train, origin, warn=True, image_endings=image_endings(args))
    view = build_training_view(args) if train else build_evaluation_view(args)
    return SegmentationFiles(
        pairs,
        view,
        classes,
        mean_and_std(args),
        args.reduce_zero_label,
        args.seed,
        passes,
        pixel_format(args),
    )


def build_validation_loader(
    args: argparse.Namespace, run: run_state.Run, dataset: SegmentationFiles
) -> Loader:
    return run_state.build_eval_loader(dataset, run, batch_size=1)


def collect_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> RunFlags:
    return RunFlags(vars(args), functools.partial(arguments.format_flag, parser))


def build_stage(
    args: argparse.Namespace, run: run_state.Run, classes: Sequence[str], validation: Loader | None
) -> SegmentationStage:
    colors = read_palette(args.palette, len(classes))
    return SegmentationStage(
        run.device,
        run.precision,
        build_sliding_window(args),
        classes,
        colors,
        mean_and_std(args),
        validation,
        args.aux_weight,
    )


def use_trained_model(args: arguments.Flags) -> None:
    """--eval or --predict: the model of --resume (or --finetune), built from its file."""
    parser = get_parser()
    run = run_state.start_run(parser, args, trains=False)
    arguments.warn_of_idle_flags(parser, args, idle_flags(args))
    source, origin = (args.resume, "`resume`") if args.resume else (args.finetune, "`finetune`")
    content = trained_segmenter.read_segmenter(source, origin)
    looks = trained_segmenter.LOOKS_AS_TRAINED
    args = args.replace(**take_training_flags(content.flags, looks, collect_flags(parser, args), args.given))
    args = resolve_pixel_flags(args, run, None, [(content.flags, f"{origin} {source}")])
    model = trained_segmenter.build_segmenter(content, f"{origin} {source}").to(run.device)
    names = read_class_list(class_settings(args))[0]
    classes = trained_segmenter.choose_class_names(content, names, f"{origin} {source}")
    try:
        if args.predict:
            label_images(args, run, model, build_stage(args, run, classes, None))
        else:
            evaluate(args, run, model, classes, source)
    except torch.OutOfMemoryError:
        raise UserError(
            "out of GPU memory: leave out --whole_image and the larger --eval_scales, or lower --base_size"
        ) from None


def evaluate(
    args: argparse.Namespace, run: run_state.Run, model: nn.Module, classes: Sequence[str], source: str
) -> None:
    dataset = build_dataset(args, False, classes)
    dataset.check_masks()
    scores = build_stage(args, run, classes, build_validation_loader(args, run, dataset)).measure(model)
    for line in format_table(scores, classes):
        log.info(line)
    if args.output_dir:
        by_class = {
            name: {"iou": None if math.isnan(iou) else iou, "acc": None if math.isnan(acc) else acc}
            for name, iou, acc in zip(classes, scores.iou, scores.acc, strict=True)
        }
        results = {"test_miou": scores.miou, "test_macc": scores.macc, "test_aacc": scores.aacc}
        checkpoints.write_json(
            args.output_dir, "eval.json", results | {"weights": source, "classes": by_class}
        )


def format_table(scores: Scores, classes: Sequence[str]) -> list[str]:
    """Every class, the best first; those that occur nowhere are left out."""
    rows = sorted(
        (row for row in zip(scores.iou, scores.acc, classes, strict=True) if row[0] == row[0]), reverse=True
    )
    width = max([5, *(len(name) for name in classes)])
    lines = [f"{'class':{width}}     IoU    acc"]
    lines += [f"{name:{width}}  {iou:6.2f} {'' if acc != acc else f'{acc:6.2f}'}" for iou, acc, name in rows]
    return [*lines, f"mIoU {scores.miou:.2f}  mAcc {scores.macc:.2f}  aAcc {scores.aacc:.2f}"]


def label_images(
    args: argparse.Namespace, run: run_state.Run, model: nn.Module, stage: SegmentationStage
) -> None:
    """--predict: beside each other in output_dir/predictions, under the image's name,
    labels and overlay as PNG.

    The numbers are those of the masks that the model was trained on: with
    --reduce_zero_label the first class is 1.
    """
    out, first = Path(args.output_dir) / "predictions", int(args.reduce_zero_label)
    paths = [
        Path(path)
        for path in find_images_or_file(args.predict, "--predict", image_endings(args))
        if out not in Path(path).parents
    ]
    root = Path(args.predict) if os.path.isdir(args.predict) else Path(args.predict).parent
    stems = Counter(path.with_suffix("") for path in paths)
    view, done = build_evaluation_view(args), 0
    for path in paths[run.launch.rank :: run.launch.world_size]:
        picture = read_or_leave_out(str(path), pixel_format(args))
        if picture is None:
            continue
        image, size = normalize(view(picture).to(run.device), stage.statistics), size_of(picture)
        labels = predict(model, image, (size[1], size[0]), stage.how, run.precision).cpu()
        name = path.relative_to(root)  # with its ending only where another image has the same name without
        name = name if stems[path.with_suffix("")] > 1 else name.with_suffix("")
        save_labels(labels, first, stage.colors, out / f"{name}_labels.png")
        shown = drawing.as_rgb(picture if isinstance(picture, Tensor) else to_tensor(picture))
        overlay = drawing.label_overlay(shown, labels, stage.colors)
        save_picture(overlay, str(out / f"{name}_overlay.png"), "--output_dir")
        done += 1
    done = sum(distributed.gather_objects(done))
    if not done:
        raise UserError(f"--predict {args.predict}: no image could be read")
    log.info(f"predicted  {done} of {len(paths)} images: {out}/*_labels.png and *_overlay.png")


def save_labels(labels: Tensor, first: int, colors: Tensor, path: Path) -> None:
    """Classes (h, w), the first one as number `first`, as a PNG whose palette shows
    them in color.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((labels + first).numpy().astype(np.uint8), mode="P")
    picture.putpalette([0] * 3 * first + (colors * 255).round().byte().flatten().tolist())
    picture.save(path)


if __name__ == "__main__":
    main()
