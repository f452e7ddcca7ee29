"""Pretrain a vision transformer by masked image modeling, BEiT or BEiT v2
(docs/pretraining.md).
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import arguments
import engine
import initialization
import modeling_dvae
import modeling_pretrain
import modeling_vqkd
import run_state
from checkpoint_io import checkpoints, published
from checkpoint_io.tokenizer_weights import TokenizerContent, read_tokenizer
from datasets import ImageFiles, build_knn_datasets, find_held_out
from engine_for_crop_cycle import CachedTokens
from engine_for_pretraining import Pixels, PretrainingStage, Target, Tokens
from errors import UserError, report_user_errors
from evaluation import knn
from flags.images import find_training_images, image_source, mean_and_std
from flags.pixel_format import image_endings, pixel_format, resolve_pixel_flags, warn_of_other_range
from flags.pretraining import (
    DALL_E,
    build_pretraining_views,
    check_tokenizer_channels,
    describe_codes,
    get_parser,
    idle_flags,
    parse_flags,
    predicts_all,
    student_grid,
    tokenizer_channels,
    uses_dall_e,
)
from initialization import InitialWeights
from monitoring import health
from optim_factory import LayerRates, create_optimizer, decayed_layers
from runtime import distributed
from runtime.failures import explain_errors
from runtime.terminal import log
from schedules import ScheduleOptions, build_schedule
from transforms import eval_view
from vit_backbone import cast_frozen


def build(args: arguments.Flags) -> engine.Trainer:
    """The run that the flags describe, ready for its first step."""
    # ── Setup ──
    parser = get_parser()
    run = run_state.start_run(parser, args)
    arguments.warn_of_idle_flags(parser, args, idle_flags(args))

    # ── The files of weights. First, as they may be wrong, and they say how images are read ──
    initial, tokenizer_file = initialization.read_initial_weights(args.init_from), read_tokenizer_file(args)
    args = resolve_pixels(args, run, initial, tokenizer_file)

    # ── What is predicted: the codes of a frozen tokenizer, or pixels ──
    target = build_target(args, run, tokenizer_file)

    # ── Data: two views of one crop, and a mask ──
    dataset, held_out = build_data(args)
    cached = cycle_crops(args, run, dataset, target)
    held_out_loader = None if held_out is None else run_state.build_eval_loader(held_out, run)
    knn_probe = build_knn_probe(args, run)
    loader_of = functools.partial(run_state.build_eval_loader, run=run)
    health_probe = health.build_probe(args.health_freq, held_out, dataset, args.epochs, loader_of)
    data = run_state.build_training_data(cached.dataset if cached else dataset, run)
    if cached:
        cached.open(describe_codes(args), data.sampler)

    # ── The student ──
    model = build_model(args, target.width, initial)
    old: set[str] = set()
    if initial is not None:
        old = initial.load(model, without=heads_of_other_codes(args, initial))
        initial.warn_of_other_normalization(*mean_and_std(args), "imagenet_default_mean_and_std")
    run_state.move_to_device(run, model)
    stage = PretrainingStage(
        cached or target,
        run.device,
        run.precision,
        dataset,
        mean_and_std(args),
        held_out_loader,
        predict_all=predicts_all(args),
        nothing_masked=args.no_mask,
        knn_probe=knn_probe,
        health_probe=health_probe,
    )
    log.info(f"target     {stage.task}")

    # ── Optimizer ──
    layers: LayerRates = (
        decayed_layers(args.layer_decay, model.get_num_layers()) if args.layer_decay != 1 else (None, None)
    )
    frozen = initialization.list_frozen(model, old, args.freeze_epochs)
    optimizer = create_optimizer(args, model, *layers, frozen_at_first=frozen)
    schedule = build_schedule(arguments.options(ScheduleOptions, args), args.lr, data.steps_per_epoch)
    state = run_state.new_state(model, optimizer, run, args.model)

    # ── Resume ──
    trainer = engine.Trainer(run, stage, data, schedule, state)
    trainer.resume()
    trainer.compile(*target.networks())
    return trainer


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    build(parse_flags(argv)).fit()
    distributed.stop()


def build_target(
    args: argparse.Namespace, run: run_state.Run, tokenizer_file: TokenizerContent | None
) -> Target:
    """What the patches predict: the codes of a frozen tokenizer, or their pixels."""
    if args.target == "pixels":
        patch_size = modeling_pretrain.MODELS[args.model].patch_size
        return Pixels(patch_size, mean_and_std(args), args.in_chans)
    tokenizer = build_tokenizer(args, tokenizer_file)
    if isinstance(tokenizer, modeling_vqkd.VQKD):
        tokenizer.drop_decoder()
        cast_frozen(tokenizer.encoder, run.precision.dtype)
        warn_of_other_range(tokenizer.image_range, args.image_range, f"the tokenizer {args.tokenizer_weight}")
    dim = "" if uses_dall_e(args) else f" of dim {args.codebook_dim}"
    log.info(f"tokenizer  {args.tokenizer_model}, {args.codebook_size} codes{dim}")
    return Tokens(tokenizer.to(run.device), args.codebook_size, run.device, args.teacher_channels)


def read_tokenizer_file(args: argparse.Namespace) -> TokenizerContent | None:
    """None without a tokenizer, or of DALL-E's."""
    if args.target == "pixels" or uses_dall_e(args):
        return None
    source = args.tokenizer_weight or args.tokenizer_model
    return read_tokenizer(source, f"`tokenizer_weight` {source}")


def resolve_pixels(
    args: arguments.Flags,
    run: run_state.Run,
    initial: InitialWeights | None,
    tokenizer_file: TokenizerContent | None,
) -> arguments.Flags:
    """Channels, range and normalization as `initial` were trained with, where they were
    not given; numbers for --image_range and --mean_std auto, for the range also those
    of the tokenizer, whatever channels it sees.
    """
    known = [] if initial is None else [(initial.content.flags, initial.origin)]
    if tokenizer_file is not None:
        image_range = tokenizer_file[1].get("image_range")
        known.append(({"in_chans": None, "image_range": image_range}, "the tokenizer"))
    args = resolve_pixel_flags(args, run, find_training_images, known, take=initial is not None)
    check_tokenizer_channels(args)
    return args


def build_tokenizer(args: argparse.Namespace, content: TokenizerContent | None = None) -> nn.Module:
    """Frozen, with `get_codebook_indices` (B, C, height, width) in [0, 1] -> (B, N).
    `content`: of its file, where it has been read already.
    """
    if uses_dall_e(args):
        encoder = modeling_dvae.load_dall_e_encoder(args.tokenizer_weight)
        if encoder.vocab_size != args.codebook_size:
            raise UserError(
                f"the dVAE in {args.tokenizer_weight or 'dall_e_encoder'} has {encoder.vocab_size} codes, "
                f"not {args.codebook_size}: pass --codebook_size {encoder.vocab_size}"
            )
        return encoder
    return modeling_vqkd.create_model(
        args.tokenizer_model,
        as_tokenizer=True,
        pretrained=True,
        pretrained_weight=args.tokenizer_weight,
        img_size=student_grid(args) * modeling_vqkd.PATCH_SIZE,
        n_code=args.codebook_size,
        code_dim=args.codebook_dim,
        in_chans=tokenizer_channels(args),
        content=content,
    )


def build_model(
    args: argparse.Namespace, values: int, initial: InitialWeights | None = None
) -> modeling_pretrain.VisionTransformerForMaskedImageModeling:
    """`values`: how many the head gives for a patch."""
    positions = {"use_abs_pos_emb": args.abs_pos_emb, "use_shared_rel_pos_bias": args.rel_pos_bias}
    return modeling_pretrain.create_model(
        args.model,
        img_size=args.input_size,
        in_chans=args.in_chans,
        vocab_size=values,
        drop_path_rate=args.drop_path,
        init_values=args.layer_scale_init_value,
        **(positions if initial is None else initial.extend(positions)),
        early_layers=args.early_layers,
        head_layers=args.head_layers,
        shared_lm_head=args.shared_lm_head,
    )


def heads_of_other_codes(args: argparse.Namespace, initial: InitialWeights) -> Sequence[str]:
    """The heads of --init_from where they are known to predict something else than this
    run: of as many codes they would fit, and mean nothing.
    """
    theirs = published.pretraining_tokenizer(published.find_name(initial.content.path.name))
    theirs = theirs or name_target(initial.content.flags)
    return () if theirs in (None, name_target(vars(args))) else ("lm_head.", "cls_pt_lm_head.")


def name_target(flags: Mapping[str, Any]) -> str | None:
    """What a run of these flags predicts: "pixels", a tokenizer's published name, or
    its file; None where they do not tell.
    """
    tokenizer = flags.get("tokenizer_model")
    if tokenizer is None or flags.get("target") == "pixels":
        return flags.get("target")
    file = str(flags.get("tokenizer_weight") or tokenizer)
    name = "dall_e_encoder" if tokenizer in DALL_E else published.find_name(file)
    return name or checkpoints.to_plain_data(os.path.realpath(file))


def build_data(args: argparse.Namespace) -> tuple[ImageFiles, ImageFiles | None]:
    """Unlabeled images with the two views and a mask of a grid x grid patch grid: those
    to train on, and those of --eval_data_path.
    """
    source = image_source(args)
    views = build_pretraining_views(args)
    train = ImageFiles(find_training_images(args), views, args.seed)
    if not args.eval_data_path:
        return train, None
    return train, ImageFiles(find_held_out(source), views, args.seed)


def cycle_crops(
    args: argparse.Namespace, run: run_state.Run, dataset: ImageFiles, target: Target
) -> CachedTokens | None:
    """--crop_cycle: the images, whose crops come again, and their codes, which are kept."""
    if not args.crop_cycle or not isinstance(target, Tokens):
        return None
    views = build_pretraining_views(args)
    return CachedTokens(target, dataset, views, args.crop_cycle, student_grid(args) ** 2, run)


def fill_codes(argv: Sequence[str]) -> None:
    """encode_images.py --for_pretraining: the codes of --crop_cycle, before the run that
    these flags describe needs them.
    """
    args = parse_flags(argv)
    run = run_state.start_run(get_parser(), args)
    initial, tokenizer_file = initialization.read_initial_weights(args.init_from), read_tokenizer_file(args)
    args = resolve_pixels(args, run, initial, tokenizer_file)
    cached = cycle_crops(args, run, build_data(args)[0], build_target(args, run, tokenizer_file))
    if cached is None:
        raise UserError("--for_pretraining: give --crop_cycle, how many crops of each image to encode")
    cached.open(describe_codes(args), run_state.build_training_data(cached.dataset, run).sampler)
    distributed.end_set_up()
    with explain_errors(args.output_dir):
        cached.fill()
    distributed.stop()


def build_knn_probe(args: argparse.Namespace, run: run_state.Run) -> knn.Probe | None:
    """--knn_freq: labeled images to measure the student by while it learns."""
    if not args.knn_freq:
        return None
    mean, std = mean_and_std(args)
    view = eval_view(args.input_size, mean=mean, std=std, pixels=pixel_format(args))
    train, validation, classes = build_knn_datasets(args.knn_data_path, view, args.seed, image_endings(args))
    train_loader, validation_loader = (
        run_state.build_eval_loader(split, run) for split in (train, validation)
    )
    return knn.Probe(
        train_loader, validation_loader, classes, args.knn_freq, args.knn_temperature, args.knn_standardize
    )


if __name__ == "__main__":
    main()
