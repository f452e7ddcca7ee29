"""What a frozen backbone has learned: a linear probe of every layer, or k nearest
neighbors (docs/probing.md).
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import arguments
import engine
import modeling_finetune
import run_state
from checkpoint_io import checkpoints
from data_pipeline.image_lists import Samples
from datasets import ImageFiles, build_labeled_dataset, find_labeled
from engine_for_linear_eval import CachedFeatures, LinearHeads, LinearStage
from errors import UserError, pick, report_user_errors
from evaluation import knn
from evaluation.frozen_backbone import Backbone, FrozenBackbone, open_frozen
from evaluation.held_out import evaluation_batches
from flags.images import build_eval_view, build_finetuning_view, image_source, mean_and_std
from flags.linear_eval import get_parser as get_parser
from flags.linear_eval import get_parser_for, idle_flags, parse_flags
from flags.pixel_format import resolve_pixel_flags
from optim_factory import create_optimizer
from runtime import distributed
from runtime.terminal import log
from schedules import ScheduleOptions, build_schedule
from vit_backbone import SIZES

STATISTICS_IMAGES = 10_000  # training images that give each channel's mean and variance


def build(args: arguments.Flags) -> engine.Trainer:
    """The linear probe that the flags describe, ready for its first step."""
    # ── Setup ──
    parser, published = get_parser_for(args), args.protocol == "published"
    run = run_state.start_run(parser, args)
    arguments.warn_of_idle_flags(parser, args, idle_flags(args))

    # ── The frozen backbone ──
    encode, settings = open_backbone(args, run)

    # ── Data: images, or their features ──
    train, validation, classes = build_data(encode, settings, run)
    features: Callable[[Tensor], Tensor] = torch.nn.Identity() if args.cached_features else encode
    validation_loader = run_state.build_eval_loader(validation, run, num_workers=settings.num_workers)
    data = run_state.build_training_data(train, run, settings.num_workers)

    # ── Model: a classifier for each layer ──
    log.info(f"protocol   {args.protocol} (docs/probe-protocols.md has both)")
    heads = LinearHeads(encode.layers, encode.dim, classes, published).to(run.device)
    source = {"--finetune": args.finetune, "--features": encode.features}
    stage = LinearStage(features, run.device, run.precision, validation_loader, source)

    # ── Optimizer ──
    lr = find_lr(args, data.sampler.global_batch)
    options = arguments.options(ScheduleOptions, args)
    if published:  # all parameters decay, and the rate changes once an epoch
        opt = "momentum" if args.opt == "sgd" else args.opt
        optimizer = create_optimizer(args.replace(opt=opt, lr=lr), heads, filter_bias_and_bn=False)
        schedule = build_schedule(options, lr, 1).hold(data.steps_per_epoch)
    else:
        optimizer = create_optimizer(args, heads)
        schedule = build_schedule(options, lr, data.steps_per_epoch)
    state = run_state.new_state(heads, optimizer, run, f"{encode.layers} linear heads")

    # ── Resume; a new run first measures each channel ──
    trainer = engine.Trainer(run, stage, data, schedule, state)
    trainer.resume()
    if state.step == 0 and not published:
        measure_channels(heads, features, train, settings, run)
    return trainer


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_flags(argv)
    if args.mode == "knn":
        evaluate_knn(args)
    else:
        build(args).fit()
    distributed.stop()


def resolve_pixels(args: arguments.Flags, run: run_state.Run, opened: Backbone) -> arguments.Flags:
    """Channels, range and normalization where they were not given: the backbone's, and
    where nothing says what `auto` is, of the training images.
    """

    def find(args: argparse.Namespace) -> Samples:
        return find_labeled(image_source(args), train=True, nb_classes=args.nb_classes)[0]

    return resolve_pixel_flags(args, run, find, [(opened.flags, args.finetune)], take=True)


def open_backbone(args: arguments.Flags, run: run_state.Run) -> tuple[FrozenBackbone, argparse.Namespace]:
    """The backbone of --finetune, and the flags with the settings of the images (or
    cached features) that it takes.
    """
    opened = open_frozen(
        args.finetune,
        args.input_size,
        args.num_heads,
        args.imagenet_default_mean_and_std,
        origin="--finetune",
        keys=args.checkpoint_key,
        in_chans=args.in_chans,
    )
    args = resolve_pixels(args, run, opened)
    if args.mean_std is not None:
        mean, std = mean_and_std(args)
        opened = dataclasses.replace(opened, mean=mean, std=std)
    depth = opened.model.get_num_layers()
    if args.model:
        refuse_other_size(opened.model, args.model, args.finetune)
    if args.knn_layer is not None and args.knn_layer > depth:
        raise UserError(f"--knn_layer {args.knn_layer}: the backbone has {depth} blocks, 1 to {depth}")
    features = args.features
    if features == "auto":
        unknown = "cls_mean" if args.mode == "linear" and opened.has_cls else "mean"
        features = opened.summary or unknown
    layer = (args.knn_layer or depth) if args.mode == "knn" else None
    opened.model.to(run.device)
    try:
        encode = FrozenBackbone(opened, features, run.precision, layer)
    except UserError as error:
        raise UserError(f"--features {error}") from None
    what = f"layer {layer}" if layer else f"{depth} layers"
    log.info(
        f"features   {features} of {what}, {encode.dim} numbers each; images normalized by "
        f"{opened.describe_statistics()}"
    )
    images = {"input_size": opened.img_size, "crop_pct": args.crop_pct or opened.crop_pct}
    images["look"] = (opened.mean, opened.std), opened.interpolation
    no_augmentation = {"aa": "none", "reprob": 0.0, "remode": "pixel", "recount": 1}  # but crop and flip
    # then there are no images to read in the background
    in_memory = {"num_workers": 0} if args.cached_features else {}
    return encode, args.replace(**images, **no_augmentation, **in_memory)


def refuse_other_size(model: Any, name: str, source: str) -> None:
    """--model: the published probe's name of the backbone, which the file must hold."""
    size = SIZES[pick(modeling_finetune.MODELS, name, "model").size]
    if (model.get_num_layers(), model.embed_dim) != (size.depth, size.embed_dim):
        raise UserError(
            f"--model {name}: {source} holds {model.get_num_layers()} blocks of {model.embed_dim} channels, "
            f"not {size.depth} of {size.embed_dim}; leave the flag out, since the file tells"
        )


def find_lr(args: argparse.Namespace, batch: int) -> float:
    """The peak of the schedule: in proportion to the total batch, but for a --lr of the
    published protocol.
    """
    published = args.protocol == "published"
    if published and args.lr is not None:
        log.info(f"lr         {args.lr:.3g}, not scaled")
        return args.lr
    base = args.base_lr if published else args.lr
    log.info(f"lr         {base * batch / 256:.3g} = {base:g} x {batch} / 256")
    return base * batch / 256


def build_dataset(settings: argparse.Namespace, train: bool, augment: bool = True) -> tuple[ImageFiles, int]:
    """Training images, cropped at random where `augment` says so, or validation images;
    and the number of classes.
    """
    statistics, interpolation = settings.look
    random_crops = train and augment
    return build_labeled_dataset(
        image_source(settings),
        build_finetuning_view(settings, statistics)
        if random_crops
        else build_eval_view(settings, statistics, interpolation),
        train,
        settings.nb_classes,
        settings.label_fraction,
        settings.seed,
    )


def extract(dataset: ImageFiles, encode: FrozenBackbone, run: run_state.Run, flag: str) -> knn.Features:
    """Features of this rank's share of the data set, each image once over all ranks."""
    loader = run_state.build_eval_loader(dataset, run)
    return knn.extract(evaluation_batches(loader, run.device, flag), encode)


def cache_features(
    dataset: ImageFiles, encode: FrozenBackbone, run: run_state.Run, flag: str
) -> CachedFeatures:
    """Features of all images, in every process."""
    images, size = len(dataset), len(dataset) * encode.layers * encode.dim * 4 / 2**30
    log.info(f"features   of {images:,} images of {flag}, computed once: {size:.2f} GiB in each process")
    return CachedFeatures(knn.gather_features(extract(dataset, encode, run, flag), run.device))


def build_data(
    encode: FrozenBackbone, settings: argparse.Namespace, run: run_state.Run
) -> tuple[Any, Any, int]:
    """Training and validation images, or their features (CachedFeatures), and the
    number of classes.
    """
    cache = settings.cached_features
    train, classes = build_dataset(settings, train=True, augment=not cache)
    validation, _ = build_dataset(settings, train=False)
    if not cache:
        return train, validation, classes
    return (
        cache_features(train, encode, run, "--data_path"),
        cache_features(validation, encode, run, "--eval_data_path"),
        classes,
    )


def measure_channels(
    heads: LinearHeads,
    features: Callable[[Tensor], Tensor],
    train: Any,
    settings: argparse.Namespace,
    run: run_state.Run,
) -> None:
    """Their mean and variance over evenly spread center crops; `train`: as of build_data."""
    plain = train if settings.cached_features else build_dataset(settings, train=True, augment=False)[0]
    every = -(-len(plain) // STATISTICS_IMAGES)
    log.info(f"statistics of each channel, over {len(plain) // every:,} images")
    loader = run_state.build_eval_loader(plain, run, num_workers=settings.num_workers, every=every)
    heads.standardize_by(
        features(batch["image"]) for batch in evaluation_batches(loader, run.device, "`data_path`")
    )


def evaluate_knn(args: arguments.Flags) -> None:
    """--knn: accuracy for each number of neighbors; with --compare a table of several
    backbones on the same images.
    """
    parser = get_parser_for(args)
    run = run_state.start_run(parser, args, trains=False)
    arguments.warn_of_idle_flags(parser, args, idle_flags(args))
    compared, missing = {args.finetune: measure_knn(args, run)}, []
    for source in args.compare:
        if source in compared:
            continue
        log.info(f"backbone   {source}")
        try:
            compared[source] = measure_knn(args.replace(finetune=source), run)
        except UserError as error:  # the figures of the others are not lost
            log.warning(f"left out   {error}")
            missing.append(source)
    for line in format_comparison(compared, args.knn_k) if args.compare else ():
        log.info(line)
    if args.output_dir:
        table = {"compared": compared} if args.compare else {}
        checkpoints.write_json(args.output_dir, "knn.json", {**compared[args.finetune], **table})
    if missing:
        raise UserError(f"--compare {' '.join(missing)}: not in the table; the lines above say why")


def measure_knn(args: arguments.Flags, run: run_state.Run) -> dict[str, float]:
    encode, settings = open_backbone(args, run)
    train, classes = build_dataset(settings, train=True, augment=False)
    validation, _ = build_dataset(settings, train=False)
    log.info(
        f"data       {len(train):,} training and {len(validation):,} validation images of {classes} classes"
    )
    bank = knn.gather_features(extract(train, encode, run, "--data_path"), run.device)
    own = extract(validation, encode, run, "--eval_data_path")
    results = knn.knn_accuracies(
        bank, own, classes, run.device, args.knn_k, args.knn_temperature, args.knn_standardize
    )
    for k in args.knn_k:
        log.info(f"k = {k:<6} top-1 {results[f'knn{k}_acc1']:.2f} %  top-5 {results[f'knn{k}_acc5']:.2f} %")
    return results


def format_comparison(compared: dict[str, dict[str, float]], ks: Sequence[int]) -> list[str]:
    """Top-1 in percent: a row for each backbone, a column for each number of
    neighbors.
    """
    width = max(len(source) for source in compared)
    lines = [f"{'top-1, %':{width}}" + "".join(f"{f'k = {k}':>10}" for k in ks)]
    return lines + [
        f"{source:{width}}" + "".join(f"{results[f'knn{k}_acc1']:10.2f}" for k in ks)
        for source, results in compared.items()
    ]


if __name__ == "__main__":
    main()
