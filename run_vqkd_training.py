"""Train a VQ-KD visual tokenizer: python run_vqkd_training.py --data_path photos --output_dir out (README: recipes)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import arguments
import checkpointing
import distributed
import engine
import modeling_vqkd
import run_state
from datasets import build_held_out_dataset, build_vqkd_dataset
from distributed import log
from engine_for_vqkd import TokenizerStage
from errors import UserError, tells_the_user
from norm_ema_quantizer import FEATURES_PER_CODE
from optim_factory import build_schedule, create_optimizer
from samplers import build_eval_loader
from vqkd_teachers import build_teacher, check_name


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("VQ-KD tokenizer training")
    arguments.add_vqkd_flags(parser)
    arguments.add_data_flags(parser, data_set="image_folder", color_jitter=0.0)
    arguments.add_optimizer_flags(
        parser,
        lr=5e-5,
        min_lr=1e-5,
        weight_decay=1e-4,
        epochs=100,
        lr_help="for a total batch of 128; scaled by total / 128",
    )
    arguments.add_run_flags(parser, save_ckpt_freq=20)
    return parser


def build_model(args: argparse.Namespace, weights: str | None = None) -> modeling_vqkd.VQKD:
    """The tokenizer with its teacher; `weights`: a trained tokenizer's file."""
    name = args.teacher_model_type or modeling_vqkd.default_teacher(args.model)
    teacher = build_teacher(
        name, args.teacher_weight, args.teacher_input_size, grid=args.input_size // modeling_vqkd.PATCH_SIZE
    )
    if args.standardize_teacher != "auto":
        teacher.standardize = args.standardize_teacher == "on"
    log.info(f"teacher    {name} at {args.teacher_input_size} px, {teacher.dim} channels")
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
    )


def check(args: argparse.Namespace) -> None:
    if args.input_size % modeling_vqkd.PATCH_SIZE:
        raise UserError(f"--input_size {args.input_size} is not a multiple of the patch size {modeling_vqkd.PATCH_SIZE}")
    check_name(args.teacher_model_type or modeling_vqkd.default_teacher(args.model))
    if evaluates_only(args) and not args.resume:
        raise UserError("--eval needs the tokenizer to evaluate: --resume path/to/checkpoint.pth")


def evaluates_only(args: argparse.Namespace) -> bool:
    return args.eval or args.calculate_codebook_usage


def check_warmup(args: argparse.Namespace, steps: int, images_per_step: int) -> None:
    """The codebook must be there, and have been trained for a while, before the run ends."""
    tokens_per_step = images_per_step * (args.input_size // modeling_vqkd.PATCH_SIZE) ** 2
    collecting = math.ceil(FEATURES_PER_CODE * args.codebook_n_emd / tokens_per_step)
    if args.quantizer_warmup_steps > 0 and args.quantizer_warmup_steps + collecting >= steps:
        raise UserError(
            f"--quantizer_warmup_steps {args.quantizer_warmup_steps}, and then {collecting} steps that collect features for "
            f"k-means, leave nothing of a run of {steps} steps: shorten the warm-up or raise --epochs"
        )


@tells_the_user
def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = arguments.parse(parser, argv)
    check(args)

    # ── Setup ──
    run = run_state.start_run(parser, args)
    if evaluates_only(args):
        evaluate(args, run)
        distributed.stop()
        return

    # ── Data ──
    dataset = build_vqkd_dataset(args)
    held_out = None if args.disable_eval else build_held_out_dataset(args)
    held_out_loader = build_eval_loader(held_out, args, run.launch) if held_out is not None else None
    data = run_state.training_data(dataset, run)
    check_warmup(args, args.epochs * data.steps_per_epoch, data.sampler.global_batch)

    # ── Teacher, tokenizer ──
    model = build_model(args).to(run.device)
    stage = TokenizerStage(
        model, run.device, run.precision, dataset, held_out_loader, args.quantizer_warmup_steps, args.revive_dead_codes
    )

    # ── Optimizer: the learning rate grows with the total batch ──
    lr = args.lr * data.sampler.global_batch / 128
    log.info(f"lr         {lr:.3g} = {args.lr:g} x {data.sampler.global_batch} / 128")
    optimizer = create_optimizer(args, model)
    schedule = build_schedule(args, lr, data.steps_per_epoch)
    state = run_state.new_state(model, optimizer, run)

    # ── Resume ──
    run_state.resume(state, stage, run)
    if model.teacher.standardize and state.step == 0:
        stage.calibrate_targets()

    # ── Loop ──
    engine.fit(state, stage, data, schedule, run)
    distributed.stop()


def evaluate(args: argparse.Namespace, run: run_state.Run) -> None:
    """--eval: loss and codebook usage of --resume on held-out images; needs no training images."""
    held_out = build_held_out_dataset(args)
    if held_out is None:
        raise UserError("--eval needs held-out images: --eval_data_path")
    model = build_model(args, weights=args.resume).to(run.device)
    stage = TokenizerStage(model, run.device, run.precision, held_out, build_eval_loader(held_out, args, run.launch))
    results = stage.evaluate(model)
    log.info("  ".join(f"{name} {value:.4g}" for name, value in results.items()))
    if args.calculate_codebook_usage:
        counts = stage.held_out_counts.cpu().long().tolist()
        log.info(f"unused codes: {sum(count == 0 for count in counts)} of {len(counts)}")
        if args.output_dir:
            path = checkpointing.write_text(args.output_dir, "codebook_usage.txt", "\n".join(map(str, counts)) + "\n")
            log.info(f"how often each code was used, one line a code: {path}")


if __name__ == "__main__":
    main()
