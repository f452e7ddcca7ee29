"""Train a VQ-KD visual tokenizer, or evaluate one (docs/tokenizer.md)."""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import functools
from collections.abc import Sequence

import torch

import arguments
import engine
import initialization
import modeling_vqkd
import run_state
from checkpoint_io import checkpoints
from checkpoint_io.tokenizer_weights import TokenizerContent, read_tokenizer
from data_pipeline.pixel_format import PixelFormat
from data_pipeline.samplers import Loader
from datasets import ImageFiles, find_unlabeled
from engine_for_pixel_decoder import PixelDecoderStage
from engine_for_vqkd import TokenizerStage
from errors import UserError, report_user_errors
from flags.images import find_training_images, image_source, mean_and_std
from flags.pixel_format import AUTO, pixel_format, resolve_pixel_flags
from flags.vqkd import (
    build_tokenizer_views,
    check_warmup,
    evaluates_only,
    get_parser,
    get_pixel_decoder_parser,
    idle_flags,
    parse_flags,
)
from initialization import InitialWeights
from monitoring import health
from optim_factory import LayerRates, create_optimizer, decayed_layers
from runtime import distributed
from runtime.terminal import log, say_if_slow
from schedules import ScheduleOptions, build_schedule
from transforms import eval_view
from visualization import pixel_decoder
from vit_backbone import cast_frozen
from vqkd_teachers import Teacher, build_teacher


def build(args: arguments.Flags) -> engine.Trainer:
    """The run that the flags describe, ready for its first step."""
    # ── Setup ──
    run = run_state.start_run(get_parser(), args)
    arguments.warn_of_idle_flags(get_parser(), args, idle_flags(args))
    initial = initialization.read_initial_weights(args.init_from, of_encoder=True)
    args = resolve_pixels(args, run, initial)

    # ── Data ──
    dataset = build_dataset(args)
    held_out, held_out_loader = held_out_data(args, run)
    centers = eval_view(args.input_size, pixels=pixel_format(args))
    loader_of = functools.partial(run_state.build_eval_loader, run=run)
    health_probe = health.build_probe(args.health_freq, held_out, dataset, args.epochs, loader_of, centers)
    data = run_state.build_training_data(dataset, run)
    check_warmup(args, args.epochs * data.steps_per_epoch, data.sampler.global_batch)

    # ── Teacher, tokenizer ──
    teacher = build_frozen_teacher(args).to(run.device)
    model = build_model(args, teacher, initial=initial)
    old: set[str] = set()
    if initial is not None:
        old = {f"encoder.{name}" for name in initial.load(model.encoder)}
        ours = (
            mean_and_std(args)
            if args.mean_std
            else modeling_vqkd.input_mean_std(args.process_type, args.in_chans)
        )
        initial.warn_of_other_normalization(*ours, "mean_std" if args.mean_std else "process_type")
    model.to(run.device)
    stage = TokenizerStage(
        model,
        teacher,
        run.device,
        run.precision,
        dataset,
        held_out_loader,
        args.quantizer_warmup_steps,
        args.revive_dead_codes,
        health_probe,
    )

    # ── Optimizer: the learning rate grows with the total batch ──
    depth = model.encoder.get_num_layers()
    layers: LayerRates = (
        decayed_layers(args.layer_decay, depth, "encoder.") if args.layer_decay != 1 else (None, None)
    )
    frozen = initialization.list_frozen(model, old, args.freeze_epochs)
    optimizer = create_optimizer(args, model, *layers, frozen_at_first=frozen)
    schedule = build_schedule(
        arguments.options(ScheduleOptions, args), scaled_lr(args, data), data.steps_per_epoch
    )
    state = run_state.new_state(model, optimizer, run, args.model)

    # ── Resume ──
    trainer = engine.Trainer(run, stage, data, schedule, state)
    trainer.resume()
    if teacher.standardize and state.step == 0:
        stage.calibrate_targets()
    cast_frozen(teacher, run.precision.dtype)
    trainer.compile(teacher)
    return trainer


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_flags(argv)
    if evaluates_only(args):
        evaluate(args)
    elif args.train_pixel_decoder:
        build_pixel_decoder(args).fit()
    else:
        build(args).fit()
    distributed.stop()


def resolve_pixels(
    args: arguments.Flags, run: run_state.Run, initial: InitialWeights | None
) -> arguments.Flags:
    """Channels, range and normalization as `initial` were trained with, where they were
    not given; numbers for --image_range and --mean_std auto.
    """
    known = [] if initial is None else [(initial.content.flags, initial.origin)]
    return resolve_pixel_flags(args, run, find_training_images, known, take=initial is not None)


def build_frozen_teacher(args: argparse.Namespace) -> Teacher:
    name = args.teacher_model_type or modeling_vqkd.default_teacher(args.model)
    with say_if_slow(f"teacher    building {name}"):
        teacher = build_teacher(
            name,
            args.teacher_weight,
            args.teacher_input_size,
            grid=args.input_size // modeling_vqkd.PATCH_SIZE,
            in_chans=args.in_chans,
            channels=args.teacher_channels,
        )
    if args.standardize_teacher != "auto":
        teacher.standardize = args.standardize_teacher == "on"
    log.info(f"teacher    {name} at {args.teacher_input_size} px, {teacher.dim} channels")
    return teacher


def build_model(
    args: argparse.Namespace,
    teacher: Teacher,
    weights: str | None = None,
    initial: InitialWeights | None = None,
    content: TokenizerContent | None = None,
) -> modeling_vqkd.VQKD:
    """`weights`: a trained tokenizer's file, `content`: of it, where it has been read;
    `initial`: those that its encoder starts from.
    """
    return modeling_vqkd.create_model(
        args.model,
        pretrained=weights is not None,
        pretrained_weight=weights,
        img_size=args.input_size,
        n_code=args.codebook_n_emd,
        code_dim=args.codebook_emd_dim,
        decay=args.ema_decay,
        process_type=args.process_type,
        quantize_kmeans_init=args.quantize_kmeans_init or args.quantizer_warmup_steps > 0,
        teacher=teacher,
        decoder_depth=args.decoder_depth,
        in_chans=args.in_chans,
        mean_std=None if args.mean_std is None else mean_and_std(args),
        encoder_parts=None if initial is None else initial.parts,
        content=content,
    )


def build_dataset(args: argparse.Namespace) -> ImageFiles:
    """Training images in [0, 1], randomly cropped and flipped."""
    return ImageFiles(find_training_images(args), build_tokenizer_views(args), args.seed)


def build_held_out_dataset(args: argparse.Namespace) -> ImageFiles | None:
    """Images in [0, 1], center crops: --eval_data_path, or the data set's own split;
    None without either.
    """
    if args.data_set in ("image_folder", "webdataset") and not args.eval_data_path:
        return None
    images = find_unlabeled(image_source(args), train=False)
    return ImageFiles(images, eval_view(args.input_size, pixels=pixel_format(args)), args.seed)


def held_out_data(args: argparse.Namespace, run: run_state.Run) -> tuple[ImageFiles | None, Loader | None]:
    """The held-out images and their loader, or nothing where there are none, or
    `disable_eval` says so.
    """
    held_out = None if args.disable_eval else build_held_out_dataset(args)
    return held_out, None if held_out is None else run_state.build_eval_loader(held_out, run)


def scaled_lr(args: argparse.Namespace, data: run_state.TrainingData) -> float:
    lr = args.lr * data.sampler.global_batch / 128
    log.info(f"lr         {lr:.3g} = {args.lr:g} x {data.sampler.global_batch} / 128")
    return lr


def build_pixel_decoder(args: arguments.Flags) -> engine.Trainer:
    """--train_pixel_decoder: a decoder from the codes of the frozen --tokenizer_weight
    to pixels. There is no teacher.
    """
    run = run_state.start_run(get_pixel_decoder_parser(), args)
    arguments.warn_of_idle_flags(get_pixel_decoder_parser(), args, idle_flags(args))

    # ── Tokenizer, decoder ──
    tokenizer, theirs = modeling_vqkd.open_tokenizer(args.tokenizer_weight)
    refuse_other_pixels(args, tokenizer)
    own = {"mean_std": theirs.get("mean_std"), "process_type": theirs.get("process_type", "default")}
    args = resolve_pixel_flags(args.replace(**own), run, find_training_images, [(theirs, "the tokenizer")])
    codebook = tokenizer.quantize.embedding.weight.clone()
    model = pixel_decoder.Reconstructor(tokenizer, args.pixel_decoder_depth, args.pixel_decoder_dim)
    if args.input_size != model.image_size:
        raise UserError(
            f"--input_size {args.input_size}: the tokenizer in {args.tokenizer_weight} reads images of "
            f"{model.image_size} pixels: --input_size {model.image_size}"
        )
    log.info(
        f"tokenizer  {args.tokenizer_weight}: {model.n_codes} codes, {model.grid[0]} x {model.grid[1]} "
        "tokens per image"
    )

    # ── Data ──
    dataset = build_dataset(args)
    held_out, held_out_loader = held_out_data(args, run)
    data = run_state.build_training_data(dataset, run)
    stage = PixelDecoderStage(run.device, run.precision, held_out or dataset, held_out_loader)

    # ── Optimizer, resume ──
    optimizer = create_optimizer(args, model.to(run.device))
    schedule = build_schedule(
        arguments.options(ScheduleOptions, args), scaled_lr(args, data), data.steps_per_epoch
    )
    name = f"pixel decoder {args.pixel_decoder_depth}x{args.pixel_decoder_dim}"
    state = run_state.new_state(model, optimizer, run, name)
    trainer = engine.Trainer(run, stage, data, schedule, state)
    trainer.resume()
    if not torch.equal(tokenizer.quantize.embedding.weight.cpu(), codebook):
        raise UserError(
            f"--tokenizer_weight {args.tokenizer_weight} is not the tokenizer that the checkpoint to resume "
            "was trained on: name that one, or another --output_dir"
        )
    trainer.compile()
    return trainer


def refuse_other_pixels(args: argparse.Namespace, tokenizer: modeling_vqkd.VQKD) -> None:
    """Before a folder is searched for them. `auto` becomes the tokenizer's range."""
    theirs, low_high = tokenizer.pixels, tokenizer.pixels.image_range
    asked = (args.image_range == AUTO and low_high) or args.image_range
    if asked == AUTO or theirs != PixelFormat.of_flags({**vars(args), "image_range": asked}):
        flags = "--image_range {:g} {:g}".format(*low_high) if low_high else "no --image_range"
        said = f"--in_chans {theirs.in_chans}" + (f" {flags}" if low_high else f", {flags}" if asked else "")
        raise UserError(f"the tokenizer in {args.tokenizer_weight} encodes other images: give {said}")


def evaluate(args: arguments.Flags) -> None:
    """--eval: loss and codebook usage of --resume on held-out images, which are read and
    normalized as it was trained; needs no training images.
    """
    run = run_state.start_run(get_parser(), args, trains=False)
    arguments.warn_of_idle_flags(get_parser(), args, idle_flags(args))
    content = read_tokenizer(args.resume, f"`resume` {args.resume}")
    if "process_type" not in args.given and "mean_std" not in args.given:
        args = args.replace(process_type=content[1].get("process_type", args.process_type))
    args = resolve_pixel_flags(args, run, None, [(content[1], f"`resume` {args.resume}")], take=True)
    held_out = build_held_out_dataset(args)
    if held_out is None:
        raise UserError("--eval needs held-out images: --eval_data_path")
    teacher = build_frozen_teacher(args).to(run.device)
    model = build_model(args, teacher, weights=args.resume, content=content).to(run.device)
    loader = run_state.build_eval_loader(held_out, run)
    stage = TokenizerStage(model, teacher, run.device, run.precision, held_out, loader)
    results = stage.evaluate(model)
    log.info("  ".join(f"{name} {value:.4g}" for name, value in results.items()))
    if args.calculate_codebook_usage:
        counts = stage.held_out_counts.cpu().long().tolist()
        log.info(f"unused codes: {sum(count == 0 for count in counts)} of {len(counts)}")
        if args.output_dir:
            path = checkpoints.write_text(
                args.output_dir, "codebook_usage.txt", "\n".join(map(str, counts)) + "\n"
            )
            log.info(f"how often each code was used, one line per code: {path}")


if __name__ == "__main__":
    main()
