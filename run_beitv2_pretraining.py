"""Pretrain a vision transformer by masked image modelling, BEiT or BEiT v2 (README: recipes)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import arguments
import distributed
import engine
import knn
import modeling_pretrain
import modeling_vqkd
import run_state
from datasets import build_knn_datasets, build_pretraining_dataset
from distributed import log
from engine_for_pretraining import PretrainingStage
from errors import UserError, pick, tells_the_user
from optim_factory import build_schedule, create_optimizer
from samplers import build_eval_loader
from transforms import normalisation
from vit_backbone import SIZES


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("BEiT v2 pretraining")
    arguments.add_pretraining_flags(parser)
    arguments.add_vit_flags(parser)
    arguments.add_data_flags(parser, data_set="image_folder", color_jitter=0.4)
    arguments.add_optimizer_flags(
        parser,
        lr=5e-4,
        min_lr=1e-5,
        weight_decay=0.05,
        epochs=300,
        lr_help="as it is, not scaled; 1.5e-3 for a batch of 2048",
    )
    arguments.add_knn_monitor_flags(parser)
    arguments.add_run_flags(parser, save_ckpt_freq=20)
    return parser


def patch_grid(args: argparse.Namespace) -> int:
    """Side of the student's patch grid; refuses, before any work, flags that cannot go together."""
    size, patch_size, _ = pick(modeling_pretrain.VARIANTS, args.model, "pretraining model")
    pick(modeling_vqkd.VARIANTS, args.tokenizer_model, "tokenizer")
    if args.input_size % patch_size:
        raise UserError(f"--input_size {args.input_size} is not a multiple of {args.model}'s patch size {patch_size}")
    grid = args.input_size // patch_size
    if args.second_input_size != grid * modeling_vqkd.PATCH_SIZE:
        raise UserError(
            f"--second_input_size {args.second_input_size} gives the tokenizer another grid than the model's {grid} x {grid}: "
            f"use {grid * modeling_vqkd.PATCH_SIZE}"
        )
    masked = args.num_mask_patches
    if masked is not None and not 0 < masked <= grid * grid:
        raise UserError(f"--num_mask_patches {masked}: the image has {grid} x {grid} patches; leave the flag out to mask 38 %")
    depth = SIZES[size].depth
    if args.model.endswith("_cls_pt") and not 0 < args.early_layers <= depth:
        raise UserError(f"--early_layers {args.early_layers} must lie between 1 and {args.model}'s depth, {depth}")
    if args.knn_freq < 0 or bool(args.knn_freq) != bool(args.knn_data_path):
        raise UserError("--knn_freq (epochs, above 0) and --knn_data_path (labelled images) act together: give both or neither")
    return grid


def build_tokenizer(args: argparse.Namespace) -> modeling_vqkd.VQKD:
    return modeling_vqkd.create_model(
        args.tokenizer_model,
        as_tokenizer=True,
        pretrained=True,
        pretrained_weight=args.tokenizer_weight,
        img_size=args.second_input_size,
        n_code=args.codebook_size,
        code_dim=args.codebook_dim,
    )


def build_model(args: argparse.Namespace) -> modeling_pretrain.VisionTransformerForMaskedImageModeling:
    return modeling_pretrain.create_model(
        args.model,
        img_size=args.input_size,
        vocab_size=args.codebook_size,
        drop_path_rate=args.drop_path,
        init_values=args.layer_scale_init_value,
        use_abs_pos_emb=args.abs_pos_emb,
        use_shared_rel_pos_bias=args.rel_pos_bias,
        early_layers=args.early_layers,
        head_layers=args.head_layers,
        shared_lm_head=args.shared_lm_head,
    )


def build_knn_probe(args: argparse.Namespace, run: run_state.Run) -> knn.Probe | None:
    """--knn_freq: labelled images to measure the student by while it learns."""
    if not args.knn_freq:
        return None
    train, validation, classes = build_knn_datasets(args)
    train_loader, validation_loader = (build_eval_loader(split, args, run.launch) for split in (train, validation))
    return knn.Probe(
        train_loader, validation_loader, classes, args.knn_freq, args.knn_temperature, args.knn_standardize
    )  # fmt: skip


@tells_the_user
def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = arguments.parse(parser, argv)
    grid = patch_grid(args)

    # ── Setup ──
    run = run_state.start_run(parser, args)

    # ── Data: two views of one crop, and a mask ──
    dataset = build_pretraining_dataset(args, grid)
    held_out = build_pretraining_dataset(args, grid, args.eval_data_path) if args.eval_data_path else None
    held_out_loader = build_eval_loader(held_out, args, run.launch) if held_out is not None else None
    knn_probe = build_knn_probe(args, run)
    data = run_state.training_data(dataset, run)

    # ── Models: the student, and the frozen tokenizer that gives its targets ──
    tokenizer = build_tokenizer(args).to(run.device)
    log.info(f"tokenizer  {args.tokenizer_model}, {args.codebook_size} codes of dim {args.codebook_dim}")
    model = build_model(args).to(run.device)
    mean_std = normalisation(args.imagenet_default_mean_and_std)
    stage = PretrainingStage(
        tokenizer, args.codebook_size, run.device, run.precision, dataset, mean_std, held_out_loader, knn_probe
    )  # fmt: skip

    # ── Optimizer ──
    optimizer = create_optimizer(args, model)
    schedule = build_schedule(args, args.lr, data.steps_per_epoch)
    state = run_state.new_state(model, optimizer, run)

    # ── Resume ──
    run_state.resume(state, stage, run)

    # ── Loop ──
    engine.fit(state, stage, data, schedule, run)
    distributed.stop()


if __name__ == "__main__":
    main()
