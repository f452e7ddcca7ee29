"""Pretrain a vision transformer by masked image modeling, BEiT or BEiT v2
(docs/pretraining.md).
"""

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
from errors import UserError, report_user_errors
from evaluation import knn
from flags.images import image_source, mean_and_std
from flags.pretraining import (
    build_pretraining_views,
    get_parser,
    idle_flags,
    parse_flags,
    predicts_all,
    student_grid,
    uses_dall_e,
)
from optim_factory import ScheduleOptions, build_schedule, create_optimizer
from runtime import distributed
from runtime.terminal import log
from transforms import eval_view
from vit_backbone import cast_frozen


def build(args: arguments.Flags) -> engine.Trainer:
    """The run that the flags describe, ready for its first step."""
    # ── Setup ──
    parser = get_parser()
    run = run_state.start_run(parser, args)
    arguments.warn_of_idle_flags(parser, args, idle_flags(args))

    # ── What is predicted: the codes of a frozen tokenizer, or pixels. First, as its file may be wrong ──
    target = build_target(args, run)

    # ── Data: two views of one crop, and a mask ──
    dataset, held_out = build_data(args)
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
        mean_and_std(args),
        held_out_loader,
        predict_all=predicts_all(args),
        nothing_masked=args.no_mask,
        knn_probe=knn_probe,
    )
    log.info(f"target     {stage.task}")

    # ── Optimizer ──
    optimizer = create_optimizer(args, model)
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


def build_target(args: argparse.Namespace, run: run_state.Run) -> Target:
    """What the patches predict: the codes of a frozen tokenizer, or their pixels."""
    if args.target == "pixels":
        patch_size = modeling_pretrain.MODELS[args.model].patch_size
        return Pixels(patch_size, mean_and_std(args))
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


def build_data(args: argparse.Namespace) -> tuple[ImageFiles, ImageFiles | None]:
    """Unlabeled images with the two views and a mask of a grid x grid patch grid: those
    to train on, and those of --eval_data_path.
    """
    source = image_source(args)
    views = build_pretraining_views(args)
    train = ImageFiles(find_unlabeled(source, train=True), views, args.seed)
    if not args.eval_data_path:
        return train, None
    return train, ImageFiles(find_held_out(source), views, args.seed)


def build_knn_probe(args: argparse.Namespace, run: run_state.Run) -> knn.Probe | None:
    """--knn_freq: labeled images to measure the student by while it learns."""
    if not args.knn_freq:
        return None
    mean, std = mean_and_std(args)
    view = eval_view(args.input_size, mean=mean, std=std)
    train, validation, classes = build_knn_datasets(args.knn_data_path, view, args.seed)
    train_loader, validation_loader = (
        run_state.build_eval_loader(split, run) for split in (train, validation)
    )
    return knn.Probe(
        train_loader, validation_loader, classes, args.knn_freq, args.knn_temperature, args.knn_standardize
    )


if __name__ == "__main__":
    main()
