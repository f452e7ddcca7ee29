"""Fine-tune a pretrained vision transformer for classification, or evaluate one (README: recipes)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor

import arguments
import checkpointing
import distributed
import engine
import model_zoo
import modeling_finetune
import pretrained
import run_state
from datasets import build_finetuning_dataset
from distributed import log
from engine_for_finetuning import FinetuningStage
from errors import UserError, pick, tells_the_user
from optim_factory import LayerDecayValueAssigner, build_schedule, create_optimizer, layer_decay_values
from samplers import build_eval_loader
from vit_backbone import as_pair


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("BEiT fine-tuning for classification")
    arguments.add_finetuning_flags(parser)
    arguments.add_vit_flags(parser)
    arguments.add_data_flags(parser, data_set="IMNET", color_jitter=0.4, any_shape=True)
    arguments.add_optimizer_flags(
        parser,
        lr=5e-4,
        min_lr=1e-6,
        weight_decay=0.05,
        epochs=30,
        lr_help="of the head; deeper layers by --layer_decay",
    )
    arguments.add_run_flags(parser, save_ckpt_freq=5)
    return parser


def check(args: argparse.Namespace) -> None:
    _, patch_size, _ = pick(modeling_finetune.VARIANTS, args.model, "fine-tuning model")
    if any(side % patch_size for side in as_pair(args.input_size)):
        raise UserError(f"--input_size {args.input_size} is not a multiple of {args.model}'s patch size {patch_size}")
    if args.robust_test:
        raise UserError("--robust_test is not available yet: evaluate with --eval --eval_data_path")
    if args.cutmix_minmax is not None and len(args.cutmix_minmax) != 2:
        raise UserError("--cutmix_minmax takes two numbers, the smallest and the largest share of the image")
    if args.eval and not (args.resume or args.finetune):
        raise UserError("--eval needs the model to evaluate: --resume path/to/checkpoint.pth")


def build_model(args: argparse.Namespace, nb_classes: int) -> modeling_finetune.VisionTransformer:
    return modeling_finetune.create_model(
        args.model,
        img_size=args.input_size,
        num_classes=nb_classes,
        qkv_bias=args.qkv_bias,
        drop_rate=args.drop,
        attn_drop_rate=args.attn_drop_rate,
        drop_path_rate=args.drop_path,
        init_values=args.layer_scale_init_value,
        use_abs_pos_emb=args.abs_pos_emb,
        use_rel_pos_bias=args.rel_pos_bias,
        use_mean_pooling=args.use_mean_pooling,
        init_scale=args.init_scale,
    )


def load_pretrained(model: modeling_finetune.VisionTransformer, args: argparse.Namespace) -> None:
    """--finetune: what fits is used; what does not is named."""
    weights: dict[str, Tensor] = model_zoo.load_state_dict(args.finetune, args.model_key)
    if args.model_filter_name:
        weights = {key: value for key, value in weights.items() if args.model_filter_name in key}
    if args.model_prefix:
        weights = {k.removeprefix(args.model_prefix): v for k, v in weights.items() if k.startswith(args.model_prefix)}
    pretrained.load_fitting(model, weights, f"--finetune {args.finetune}")


def build_mixup(args: argparse.Namespace, nb_classes: int) -> Mixup | None:
    if args.mixup <= 0 and args.cutmix <= 0 and args.cutmix_minmax is None:
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=nb_classes,
    )


@tells_the_user
def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = arguments.parse(parser, argv)
    check(args)

    # ── Setup ──
    run = run_state.start_run(parser, args)

    made_for = modeling_finetune.VARIANTS[args.model][2]
    if made_for >= 224 and as_pair(args.input_size) != as_pair(made_for):
        log.warning(f"warning: {args.model} is used at --input_size {args.input_size}; the {made_for} in its name is not read")

    if args.eval:
        evaluate(args, run)
        distributed.stop()
        return

    # ── Data ──
    dataset, nb_classes = build_finetuning_dataset(args, train=True)
    validation = None if args.disable_eval_during_finetuning else build_finetuning_dataset(args, train=False)[0]
    validation_loader = build_eval_loader(validation, args, run.launch) if validation is not None else None
    data = run_state.training_data(dataset, run)

    # ── Model, from pretrained weights ──
    model = build_model(args, nb_classes)
    if args.finetune:
        load_pretrained(model, args)
    model.to(run.device)
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device=torch.device("cpu") if args.model_ema_force_cpu else None)
    mixup = build_mixup(args, nb_classes)
    stage = FinetuningStage(run.device, run.precision, validation_loader, mixup, args.smoothing)

    # ── Optimizer: deeper layers learn slower ──
    layers = LayerDecayValueAssigner(layer_decay_values(args.layer_decay, model.get_num_layers()))
    skipped = set(model.no_weight_decay())
    if args.disable_weight_decay_on_rel_pos_bias:
        skipped |= {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    optimizer = create_optimizer(args, model, layers.get_layer_id, layers.get_scale, skip_list=skipped)
    schedule = build_schedule(args, args.lr, data.steps_per_epoch)
    state = run_state.new_state(model, optimizer, run, ema)

    # ── Resume ──
    run_state.resume(state, stage, run)

    # ── Loop ──
    engine.fit(state, stage, data, schedule, run)
    distributed.stop()


def evaluate(args: argparse.Namespace, run: run_state.Run) -> None:
    """--eval: accuracy of --resume (or --finetune) on the validation images; needs no training images."""
    source = args.resume or args.finetune
    weights = model_zoo.load_state_dict(source, args.model_key)
    if "head.bias" not in weights:
        raise UserError(f"{source} holds no classifier (no head.bias): fine-tune it first")
    validation, nb_classes = build_finetuning_dataset(args, train=False)
    if len(weights["head.bias"]) != nb_classes:
        raise UserError(f"{source} tells {len(weights['head.bias'])} classes apart, the validation images have {nb_classes}")
    model = build_model(args, nb_classes)
    missing = pretrained.load_fitting(model, weights, source)
    if missing:
        raise UserError(f"{source} is not the model that --model and the flags around it describe: it lacks {missing[0]}")
    stage = FinetuningStage(run.device, run.precision, build_eval_loader(validation, args, run.launch))
    results = stage.evaluate(model.to(run.device))
    log.info("  ".join(f"{name} {value:.4g}" for name, value in results.items()))
    if args.output_dir:
        checkpointing.write_json(args.output_dir, "eval.json", results)


if __name__ == "__main__":
    main()
