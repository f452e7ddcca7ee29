"""Pretrain a vision transformer by masked image modeling, BEiT or BEiT v2 (README: recipes)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import nn

import arguments
import engine
import modeling_dvae
import modeling_pretrain
import modeling_vqkd
import run_state
from datasets import ImageFiles, build_knn_datasets, find_held_out, find_unlabeled
from engine_for_pretraining import Pixels, PretrainingStage, Target, Tokens
from errors import UserError, pick, report_user_errors
from evaluation import knn
from optim_factory import build_schedule, create_optimizer
from runtime import distributed
from runtime.distributed import log
from transforms import eval_view
from vit_backbone import SIZES, cast_frozen

DALL_E = ("dall-e", "dall_e")
STRIDES = dict.fromkeys(modeling_vqkd.MODELS, modeling_vqkd.PATCH_SIZE) | dict.fromkeys(
    DALL_E, modeling_dvae.PATCH_SIZE
)


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("BEiT v2 pretraining")
    arguments.add_pretraining_flags(parser)
    arguments.add_vit_flags(parser)
    arguments.add_data_flags(parser, data_set="image_folder", color_jitter=0.4)
    arguments.add_pipeline_flags(parser)
    arguments.add_optimizer_flags(
        parser,
        lr=5e-4,
        min_lr=1e-5,
        weight_decay=0.05,
        epochs=300,
        lr_help="as it is, not scaled; 1.5e-3 for a batch of 2048",
    )
    arguments.add_knn_monitor_flags(parser)
    arguments.add_step_flags(parser, can_shard=True)
    arguments.add_run_flags(parser, save_ckpt_freq=20)
    return parser


def patch_grid(args: argparse.Namespace) -> int:
    """Side of the student's patch grid; refuses, before any work, flags that cannot go together."""
    variant = pick(modeling_pretrain.MODELS, args.model, "pretraining model")
    patch_size = variant.patch_size
    if args.input_size % patch_size:
        raise UserError(
            f"--input_size {args.input_size} is not a multiple of {args.model}'s patch size {patch_size}"
        )
    grid = args.input_size // patch_size
    check_tokenizer_view(args, grid)
    check_masks(args, grid)
    if has_cls_head(args):
        check_cls_head(args, SIZES[variant.size].depth)
    if bool(args.knn_freq) != bool(args.knn_data_path):
        raise UserError(
            "--knn_freq (epochs, above 0) and --knn_data_path (labeled images) act "
            "together: give both or neither"
        )
    return grid


def check_tokenizer_view(args: argparse.Namespace, grid: int) -> None:
    stride = tokenizer_stride(args)
    if stride is not None and args.second_input_size not in (None, grid * stride):
        raise UserError(
            f"--second_input_size {args.second_input_size} gives the tokenizer another grid than the "
            f"model's {grid} x {grid}: "
            f"use {grid * stride}, or leave it out"
        )


def check_masks(args: argparse.Namespace, grid: int) -> None:
    masked = args.num_mask_patches
    if args.no_mask and masked:
        raise UserError(
            f"--num_mask_patches {masked} and --no_mask contradict each other: leave one of them out"
        )
    if args.no_mask and args.predict == "masked":
        raise UserError(
            "--no_mask leaves nothing for --predict masked: leave it out, then all patches are predicted"
        )
    if masked is not None and not args.no_mask and not 0 < masked <= grid * grid:
        raise UserError(
            f"--num_mask_patches {masked}: the image has {grid} x {grid} patches; leave the flag out "
            "to mask 38 %, or give "
            "--no_mask to mask none"
        )


def check_cls_head(args: argparse.Namespace, depth: int) -> None:
    if not 0 < args.early_layers <= depth:
        raise UserError(
            f"--early_layers {args.early_layers} must lie between 1 and {args.model}'s depth, {depth}"
        )
    if args.head_layers < 1:
        raise UserError(
            f"--head_layers {args.head_layers} must be 1 or more: the CLS token reaches the patches "
            "through these blocks "
            f"alone. Without the CLS head: --model {args.model.removesuffix('_cls_pt')}"
        )


def has_cls_head(args: argparse.Namespace) -> bool:
    return args.model.endswith("_cls_pt")


def uses_dall_e(args: argparse.Namespace) -> bool:
    return args.tokenizer_model in DALL_E


def predicts_all(args: argparse.Namespace) -> bool:
    return args.no_mask or args.predict == "all"


def tokenizer_stride(args: argparse.Namespace) -> int | None:
    """Pixels of the tokenizer's view for each patch; None where there is no tokenizer."""
    return None if args.target == "pixels" else pick(STRIDES, args.tokenizer_model, "tokenizer")


def idle_flags(args: argparse.Namespace) -> dict[str, str]:
    """Flag -> why it does nothing beside the others."""
    idle: dict[str, str] = {}
    if not has_cls_head(args):
        idle |= dict.fromkeys(
            ("early_layers", "head_layers", "shared_lm_head"), f"{args.model} has no CLS head"
        )
    if args.no_mask or args.mask_type == "random":
        reason = "--no_mask" if args.no_mask else "--mask_type random"
        idle |= dict.fromkeys(
            ("min_mask_patches_per_block", "max_mask_patches_per_block"), f"{reason} has no blocks"
        )
    if args.no_mask:
        idle["mask_type"] = "--no_mask masks nothing"
    if args.target == "pixels":
        names = ("tokenizer_model", "tokenizer_weight", "second_input_size", "second_interpolation")
        idle |= dict.fromkeys((*names, "codebook_size", "codebook_dim"), "--target pixels has no tokenizer")
    elif uses_dall_e(args):
        idle["codebook_dim"] = f"the codes of {args.tokenizer_model} have no dimension"
    if not args.knn_freq:
        idle |= dict.fromkeys(("knn_temperature", "knn_standardize"), "without --knn_freq there is no k-NN")
    return idle


def build_target(args: argparse.Namespace, run: run_state.Run) -> Target:
    """What the patches predict: the codes of a frozen tokenizer, or their pixels."""
    if args.target == "pixels":
        patch_size = modeling_pretrain.MODELS[args.model].patch_size
        return Pixels(patch_size, arguments.mean_and_std(args))
    tokenizer = build_tokenizer(args).to(run.device)
    if isinstance(tokenizer, modeling_vqkd.VQKD):
        cast_frozen(tokenizer.encoder, run.precision.dtype)
    dim = "" if uses_dall_e(args) else f" of dim {args.codebook_dim}"
    log.info(f"tokenizer  {args.tokenizer_model}, {args.codebook_size} codes{dim}")
    return Tokens(tokenizer, args.codebook_size, run.device)


def build_tokenizer(args: argparse.Namespace) -> nn.Module:
    """Frozen, with `get_codebook_indices` (B, 3, height, width) in [0, 1] -> (B, N)."""
    if uses_dall_e(args):
        encoder = modeling_dvae.load_dall_e_encoder(args.tokenizer_weight)
        if encoder.vocab_size != args.codebook_size:
            raise UserError(
                f"the dVAE in {args.tokenizer_weight or 'dall_e_encoder'} has {encoder.vocab_size} "
                "codes, not "
                f"{args.codebook_size}: pass --codebook_size {encoder.vocab_size}"
            )
        return encoder
    return modeling_vqkd.create_model(
        args.tokenizer_model,
        as_tokenizer=True,
        pretrained=True,
        pretrained_weight=args.tokenizer_weight,
        img_size=patch_grid(args) * modeling_vqkd.PATCH_SIZE,
        n_code=args.codebook_size,
        code_dim=args.codebook_dim,
    )


def build_model(
    args: argparse.Namespace, values: int
) -> modeling_pretrain.VisionTransformerForMaskedImageModeling:
    """`values`: how many the head gives for a patch."""
    return modeling_pretrain.create_model(
        args.model,
        img_size=args.input_size,
        vocab_size=values,
        drop_path_rate=args.drop_path,
        init_values=args.layer_scale_init_value,
        use_abs_pos_emb=args.abs_pos_emb,
        use_shared_rel_pos_bias=args.rel_pos_bias,
        early_layers=args.early_layers,
        head_layers=args.head_layers,
        shared_lm_head=args.shared_lm_head,
    )


def build_data(args: argparse.Namespace, grid: int) -> tuple[ImageFiles, ImageFiles | None]:
    """Unlabeled images with the two views and a mask of a grid x grid patch grid: those to
    train on, and those of --eval_data_path.
    """
    source = arguments.image_source(args)
    views = arguments.build_pretraining_views(args, grid, tokenizer_stride(args))
    train = ImageFiles(find_unlabeled(source, train=True), views, args.seed)
    if not args.eval_data_path:
        return train, None
    return train, ImageFiles(find_held_out(source), views, args.seed)


def build_knn_probe(args: argparse.Namespace, run: run_state.Run) -> knn.Probe | None:
    """--knn_freq: labeled images to measure the student by while it learns."""
    if not args.knn_freq:
        return None
    mean, std = arguments.mean_and_std(args)
    view = eval_view(args.input_size, mean=mean, std=std)
    train, validation, classes = build_knn_datasets(args.knn_data_path, view, args.seed)
    train_loader, validation_loader = (
        run_state.build_eval_loader(split, run) for split in (train, validation)
    )
    return knn.Probe(
        train_loader, validation_loader, classes, args.knn_freq, args.knn_temperature, args.knn_standardize
    )


def build(args: arguments.Flags) -> engine.Trainer:
    """The run that the flags describe, ready for its first step."""
    parser, grid = get_parser(), patch_grid(args)

    # ── Setup ──
    run = run_state.start_run(parser, args)
    arguments.warn_of_idle_flags(parser, args, idle_flags(args))

    # ── What is predicted: the codes of a frozen tokenizer, or pixels. First, as its file may be wrong ──
    target = build_target(args, run)

    # ── Data: two views of one crop, and a mask ──
    dataset, held_out = build_data(args, grid)
    held_out_loader = None if held_out is None else run_state.build_eval_loader(held_out, run)
    knn_probe = build_knn_probe(args, run)
    data = run_state.build_training_data(dataset, run)

    # ── The student ──
    model = build_model(args, target.width)
    run_state.move_to_device(run, model)
    stage = PretrainingStage(
        target,
        run.device,
        run.precision,
        dataset,
        arguments.mean_and_std(args),
        held_out_loader,
        predict_all=predicts_all(args),
        nothing_masked=args.no_mask,
        knn_probe=knn_probe,
    )
    log.info(f"target     {stage.task}")

    # ── Optimizer ──
    optimizer = create_optimizer(args, model)
    schedule = build_schedule(args, args.lr, data.steps_per_epoch)
    state = run_state.new_state(model, optimizer, run, args.model)

    # ── Resume ──
    trainer = engine.Trainer(run, stage, data, schedule, state)
    trainer.resume()
    trainer.compile(*target.networks())
    return trainer


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    build(args).fit()
    distributed.stop()


if __name__ == "__main__":
    main()
