"""Fine-tune a pretrained vision transformer for classification; evaluate one; classify
images (docs/fine-tuning.md, docs/evaluation.md).
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import arguments
import engine
import modeling_finetune
import pretrained
import run_state
from checkpoint_io import checkpoints, weight_source
from data_pipeline import imagenet_classes
from data_pipeline.image_lists import Samples, find_images_or_file
from datasets import ImageFiles, build_labeled_dataset, find_labeled
from engine_for_finetuning import FinetuningStage, SomeLogits, WithMirrorImage, balanced_class_weights
from errors import UserError, report_user_errors
from evaluation import predictions, trained_classifier
from evaluation.confusion import describe_worst, format_worst
from evaluation.run_flags import RunFlags
from flags.finetuning import get_parser, idle_flags, parse_flags, warn_of_input_size
from flags.images import build_eval_view, build_finetuning_view, image_source, mean_and_std
from flags.pixel_format import image_endings, resolve_pixel_flags
from optim_factory import create_optimizer, decayed_layers
from runtime import distributed
from runtime.terminal import log
from schedules import ScheduleOptions, build_schedule


def build(args: arguments.Flags) -> engine.Trainer:
    """The run that the flags describe, ready for its first step."""
    parser = get_parser()

    # ── Setup ──
    run = run_state.start_run(parser, args)
    warn_of_input_size(args)
    arguments.warn_of_idle_flags(parser, args, idle_flags(args))

    # ── Pretrained weights ──
    weights = read_pretrained(args)
    args = resolve_pixels(args, run, weights)

    # ── Data ──
    dataset, nb_classes = build_dataset(args, train=True)
    validation = None if args.disable_eval_during_finetuning else build_dataset(args, train=False)[0]
    validation_loader = None if validation is None else run_state.build_eval_loader(validation, run)
    labels = dataset.labels if args.balanced_sampler else None
    data = run_state.build_training_data(dataset, run, labels=labels)
    sizes = torch.bincount(torch.as_tensor(dataset.labels), minlength=nb_classes)
    equally = ", drawn equally often" if args.balanced_sampler else ""
    many = " to ".join(f"{size:,}" for size in sorted({int(sizes.min()), int(sizes.max())}))
    log.info(f"classes    {many} training images each{equally}")

    # ── Model ──
    model = build_model(args, nb_classes)
    if weights is not None:  # what fits is used; what does not is named
        pretrained.load_fitting(model, weights.weights, f"--finetune {args.finetune}")
        trained_classifier.warn_of_other_pretraining(
            weights.weights, weights.flags, collect_flags(parser, args), f"`finetune` {args.finetune}"
        )
    ema = None
    if args.model_ema:
        kept_on = torch.device("cpu") if args.model_ema_force_cpu else None  # None: where the model is
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device=kept_on, foreach=kept_on is None)
    run_state.move_to_device(run, model, ema)
    mixup = build_mixup(args, nb_classes)
    stage = FinetuningStage(
        run.device,
        run.precision,
        validation_loader,
        mixup,
        args.smoothing,
        dataset.classes,
        balanced_class_weights(sizes) if args.class_weights == "balanced" else None,
        args.best_metric,
        mean_and_std(args),
    )

    # ── Optimizer: deeper layers learn slower ──
    layers = decayed_layers(args.layer_decay, model.get_num_layers())
    skipped = set(model.no_weight_decay())
    if args.disable_weight_decay_on_rel_pos_bias:
        skipped |= {
            name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")
        }
    optimizer = create_optimizer(args, model, *layers, skip_list=skipped)
    schedule = build_schedule(arguments.options(ScheduleOptions, args), args.lr, data.steps_per_epoch)
    state = run_state.new_state(model, optimizer, run, args.model, ema)

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


def build_model(args: argparse.Namespace, nb_classes: int) -> modeling_finetune.VisionTransformer:
    return modeling_finetune.create_model(
        args.model,
        img_size=args.input_size,
        in_chans=args.in_chans,
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


def resolve_pixels(
    args: arguments.Flags, run: run_state.Run, weights: weight_source.WeightSource | None
) -> arguments.Flags:
    """Numbers for --image_range and --mean_std auto: those of --finetune, else of the
    training images.
    """

    def find(args: argparse.Namespace) -> Samples:
        return find_labeled(image_source(args), train=True, nb_classes=args.nb_classes)[0]

    known = [] if weights is None else [(weights.flags, f"--finetune {args.finetune}")]
    return resolve_pixel_flags(args, run, find, known)


def read_pretrained(args: argparse.Namespace) -> weight_source.WeightSource | None:
    """--finetune, before the images are looked for: a wrong file is reported at once."""
    if not args.finetune:
        return None
    return weight_source.read_weights(
        args.finetune, keys=args.model_key, select=build_selection(args), origin="`finetune`"
    )


def build_selection(args: argparse.Namespace) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return functools.partial(
        trained_classifier.select_weights,
        model_filter_name=args.model_filter_name,
        model_prefix=args.model_prefix,
    )


def collect_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> RunFlags:
    return RunFlags(vars(args), functools.partial(arguments.format_flag, parser))


def build_dataset(
    args: argparse.Namespace, train: bool, own_classes: bool = False, classes: Sequence[str] | None = None
) -> tuple[ImageFiles, int]:
    """Training images, augmented, or validation images; and the number of classes."""
    return build_labeled_dataset(
        image_source(args),
        build_finetuning_view(args) if train else build_eval_view(args),
        train,
        args.nb_classes,
        args.label_fraction,
        args.seed,
        own_classes,
        classes,
    )


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


def use_trained_model(args: arguments.Flags) -> None:
    """--eval or --predict with --resume (or --finetune): the model is built from its
    file and used as it was trained, but for the flags that were given.
    """
    parser = get_parser()
    run = run_state.start_run(parser, args, trains=False)
    arguments.warn_of_idle_flags(parser, args, idle_flags(args))
    trained = trained_classifier.read_classifier(
        args.resume or args.finetune,
        "`resume`" if args.resume else "`finetune`",
        args.model_ema,
        args.model_key,
        build_selection(args),
    )
    args = args.replace(
        **trained_classifier.look_as_trained(trained, collect_flags(parser, args), args.given)
    )
    args = resolve_pixel_flags(args, run, None, [(trained.flags, trained.source)])
    if "model" in args.given:
        warn_of_input_size(args)
    model: nn.Module = trained_classifier.build_classifier(trained, collect_flags(parser, args), args.given)
    model.to(run.device)
    if args.predict:
        classify_images(args, run, model, trained)
    else:
        evaluate(args, run, model, trained)


def evaluate(
    args: argparse.Namespace,
    run: run_state.Run,
    model: nn.Module,
    trained: trained_classifier.TrainedClassifier,
) -> None:
    """--eval: accuracy on the validation images; needs no training images."""
    where = (
        f"--eval_data_path {args.eval_data_path}" if args.eval_data_path else f"--data_path {args.data_path}"
    )
    name = "validation"
    if args.robust_test:
        robust = imagenet_classes.robust_set(args.robust_test)
        name = robust.name
        trained_classifier.refuse_other_than_imagenet(trained, robust)
        images, _ = build_dataset(args, train=False, own_classes=True)
        indices = imagenet_classes.logits_of(images.classes or (), robust, where)
        model = SomeLogits(model, indices).to(run.device)
    else:
        images, _ = build_dataset(args, train=False, classes=trained.classes)
        trained_classifier.refuse_other_classes(trained, images.classes or (), where)

    stage = FinetuningStage(run.device, run.precision, run_state.build_eval_loader(images, run))
    results, confusion = stage.measure(WithMirrorImage(model) if args.tta_flip else model)

    log.info(f"{name}  " + "  ".join(f"{key} {value:.4g}" for key, value in results.items()))
    worst = describe_worst(confusion.worst(args.worst_classes), images.classes or ())
    for line in format_worst(worst) if worst else ():
        log.info(line)
    if args.output_dir:
        how = {"set": name, "weights": trained.source, "model_ema": args.model_ema, "tta_flip": args.tta_flip}
        checkpoints.write_json(args.output_dir, "eval.json", results | how | {"worst_classes": worst})


def classify_images(
    args: argparse.Namespace,
    run: run_state.Run,
    model: nn.Module,
    trained: trained_classifier.TrainedClassifier,
) -> None:
    """--predict: output_dir/predictions.csv, the likeliest classes of every image, and
    unreadable.txt.
    """
    paths = find_images_or_file(args.predict, "`predict`", image_endings(args))
    root = args.predict if os.path.isdir(args.predict) else os.path.dirname(args.predict)
    images = ImageFiles([(path, None) for path in paths], build_eval_view(args))
    loader = run_state.build_eval_loader(images, run)
    found = predictions.predict(
        WithMirrorImage(model) if args.tta_flip else model, loader, run.device, run.precision
    )
    if not found.answers:
        raise UserError(f"`predict` {args.predict}: no image could be read: {found.describe_failures()}")
    classes = trained.classes or [f"class {number}" for number in range(trained.nb_classes)]
    if trained.classes is None:
        log.warning(f"warning: {trained.source} holds no names of its classes: they are numbered from 0")
    names = [os.path.relpath(path, root or ".") for path in paths]
    predictions.write_predictions(Path(args.output_dir), found, names, classes)
    if found.failed:
        log.warning(
            f"warning: {len(found.failed)} of {len(paths)} files cannot be read, all in "
            f"{args.output_dir}/{predictions.UNREADABLE}: {found.describe_failures()}"
        )
    log.info(f"predicted  {len(found.answers)} of {len(paths)} images: {args.output_dir}/{predictions.TABLE}")


if __name__ == "__main__":
    main()
