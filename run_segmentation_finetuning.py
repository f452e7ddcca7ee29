"""Fine-tune a pretrained vision transformer for semantic segmentation; evaluate one; label images (docs/segmentation.md)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image

import arguments
import checkpointing
import distributed
import engine
import modeling_segmentation
import run_state
import segmentation_data
import trained_segmenter
import visualization
import weight_source
from distributed import log
from engine_for_segmentation import Scores, SegmentationStage
from errors import UserError, pick, tells_the_user
from image_lists import find_images
from optim_factory import LayerDecayValueAssigner, build_poly_schedule, create_optimizer, layer_decay_values
from samplers import EvalSampler, build_loader
from segmentation_data import SegmentationFiles
from sliding_window import Looking, predict
from trained_classifier import warn_of_other_pretraining
from transforms import normalisation
from viewing import read_or_leave_out


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("BEiT fine-tuning for semantic segmentation")
    arguments.add_segmentation_flags(parser)
    arguments.add_vit_flags(parser)
    arguments.add_poly_optimizer_flags(parser, lr=5e-5, weight_decay=0.05, max_steps=160000)
    arguments.add_step_flags(parser)
    arguments.add_run_flags(parser, save_ckpt_freq=1)
    return parser


def check(args: argparse.Namespace) -> None:
    pick(modeling_segmentation.VARIANTS, args.model, "segmentation model")
    if args.input_size % 16:
        raise UserError(f"--input_size {args.input_size} is not a multiple of the patch size 16")
    if (args.eval or args.predict) and not (args.resume or args.finetune):
        raise UserError(f"--{'eval' if args.eval else 'predict'} needs a trained model: --resume path/to/checkpoint.pth")
    if args.predict and not args.output_dir:
        raise UserError("--predict writes pictures: name a folder for them, --output_dir")
    if not args.data_path and not args.predict and not (args.eval and args.eval_data_path):
        raise UserError("--data_path is missing: name the folder of images/ and annotations/ (docs/segmentation.md)")
    if args.scale_range[0] > args.scale_range[1]:
        raise UserError(f"--scale_range {' '.join(map(str, args.scale_range))}: the smaller number comes first")


def looking(args: argparse.Namespace) -> Looking:
    window = None if args.whole_image else args.input_size
    stride = args.stride or math.floor(args.input_size * 2 / 3)
    return Looking(window, stride, args.eval_scales, args.tta_flip, args.batch_size)


def evaluation_loader(args: argparse.Namespace, run: run_state.Run, dataset: SegmentationFiles) -> DataLoader:
    """Image by image, since each has a size of its own."""
    sampler = EvalSampler(len(dataset), 1, run.launch.rank, run.launch.world_size)
    return build_loader(dataset, sampler, args.num_workers, args.pin_mem)


def build_stage(
    args: argparse.Namespace, run: run_state.Run, classes: Sequence[str], validation: DataLoader | None
) -> SegmentationStage:
    colours, statistics = segmentation_data.palette(args, len(classes)), normalisation(args.imagenet_default_mean_and_std)
    return SegmentationStage(
        run.device, run.precision, looking(args), classes, colours, statistics, validation, args.aux_weight
    )


@tells_the_user
def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = arguments.parse(parser, argv)
    check(args)

    # ── Setup ──
    run = run_state.start_run(parser, args)
    if args.eval or args.predict:
        use_finished(parser, args, run)
        distributed.stop()
        return
    start = weight_source.read(args.finetune, flag="--finetune") if args.finetune else None

    # ── Data ──
    pairs = segmentation_data.find_pairs(args.data_path, train=True)
    classes = segmentation_data.read_classes(args, pairs)
    log.info(f"classes    {len(classes)}: {', '.join(classes[:6])}{' ...' if len(classes) > 6 else ''}")
    global_batch = args.batch_size * run.launch.world_size * args.update_freq
    passes = math.ceil(min(args.steps_per_epoch, args.max_steps) * global_batch / len(pairs))
    data = run_state.training_data(segmentation_data.build_dataset(args, True, classes, passes), run)
    validation = None
    if not args.disable_eval:
        validation = evaluation_loader(args, run, segmentation_data.build_dataset(args, False, classes))
        log.info(f"evaluation {len(validation.dataset):,} images, {len(classes)} classes")  # type: ignore[arg-type]

    # ── Model ──
    model: nn.Module = modeling_segmentation.create_model(
        args.model,
        len(classes),
        args.input_size,
        drop_path_rate=args.drop_path,
        init_values=args.layer_scale_init_value,
        use_abs_pos_emb=args.abs_pos_emb,
        use_rel_pos_bias=args.rel_pos_bias,
    )
    modeling_segmentation.set_head_dropout(model, args.head_drop)
    if start is not None:
        trained_segmenter.load_pretrained(model, start, f"--finetune {args.finetune}")  # type: ignore[arg-type]
        warn_of_other_pretraining(start.weights, start.flags, parser, args)
    model.to(run.device)
    if run.device.type == "cuda" and run.launch.world_size > 1:  # torch's fused one, where there is one
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    stage = build_stage(args, run, classes, validation)

    # ── Optimizer: deeper layers learn slower ──
    layers = LayerDecayValueAssigner(layer_decay_values(args.layer_decay, model.get_num_layers()))  # type: ignore[operator]
    optimizer = create_optimizer(
        args, model, lambda name: layers.get_layer_id(name.removeprefix("backbone.")), layers.get_scale
    )
    schedule = build_poly_schedule(args)
    state = run_state.new_state(model, optimizer, run)

    # ── Resume ──
    run_state.resume(state, stage, run)
    run_state.compile_networks(run, data, model)

    # ── Loop ──
    engine.fit(state, stage, data, schedule, run)
    distributed.stop()


# ── A finished model ─────────────────────────────────────────────────────────────────────────────────────────────────


def use_finished(parser: argparse.ArgumentParser, args: argparse.Namespace, run: run_state.Run) -> None:
    """--eval or --predict with --resume (or --finetune): the model is built from its file, and looks as in its training."""
    source, flag = (args.resume, "--resume") if args.resume else (args.finetune, "--finetune")
    content = trained_segmenter.read(source, flag)
    args = trained_segmenter.as_trained(parser, args, content)
    model = trained_segmenter.build(content, f"{flag} {source}").to(run.device)
    count = trained_segmenter.number_of_classes(content.weights)
    classes = content.classes or [f"class {number}" for number in range(count)]
    if args.predict:
        label_images(args, run, model, build_stage(args, run, classes, None))
        return
    stage = build_stage(args, run, classes, evaluation_loader(args, run, segmentation_data.build_dataset(args, False, classes)))
    scores = stage.measure(model)
    for line in as_table(scores, classes):
        log.info(line)
    if args.output_dir:
        by_class = {name: {"iou": iou, "acc": acc} for name, iou, acc in zip(classes, scores.iou, scores.acc, strict=True)}
        results = {"test_miou": scores.miou, "test_macc": scores.macc, "test_aacc": scores.aacc}
        checkpointing.write_json(args.output_dir, "eval.json", results | {"weights": source, "classes": by_class})


def as_table(scores: Scores, classes: Sequence[str]) -> list[str]:
    """Every class, the best first; those that occur nowhere are left out."""
    rows = sorted((row for row in zip(scores.iou, scores.acc, classes, strict=True) if row[0] == row[0]), reverse=True)
    width = max([5, *(len(name) for name in classes)])
    lines = [f"{'class':{width}}     IoU    acc"]
    lines += [f"{name:{width}}  {iou:6.2f} {'' if acc != acc else f'{acc:6.2f}'}" for iou, acc, name in rows]
    return [*lines, f"mIoU {scores.miou:.2f}  mAcc {scores.macc:.2f}  aAcc {scores.aacc:.2f}"]


def label_images(args: argparse.Namespace, run: run_state.Run, model: nn.Module, stage: SegmentationStage) -> None:
    """--predict: beside each other in output_dir/predictions, under the image's name, labels and overlay as PNG."""
    paths = find_images(args.predict, "--predict")[0]
    root, out = Path(args.predict), Path(args.output_dir) / "predictions"
    view = segmentation_data.evaluation_view(args)
    for path in [str(path) for path, _ in paths][run.launch.rank :: run.launch.world_size]:
        picture = read_or_leave_out(path)
        if picture is None:
            continue
        image = segmentation_data.normalised(view(picture).to(run.device), stage.statistics)
        labels = predict(model, image, (picture.height, picture.width), stage.how, run.precision).cpu()
        name = Path(path).relative_to(root).with_suffix("") if root.is_dir() else Path(Path(path).stem)
        save_labels(labels, stage.colours, out / f"{name}_labels.png")
        overlay = visualization.label_overlay(to_tensor(picture), labels, stage.colours)
        save_image(overlay, out / f"{name}_overlay.png")
    log.info(f"predicted  {len(paths)} images: {out}/*_labels.png and *_overlay.png")


def save_labels(labels: Tensor, colours: Tensor, path: Path) -> None:
    """Class numbers (h, w) as a PNG whose palette shows them in colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(labels.numpy().astype(np.uint8), mode="P")
    picture.putpalette((colours * 255).round().byte().flatten().tolist())
    picture.save(path)


if __name__ == "__main__":
    main()
