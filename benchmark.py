"""How fast the stages are beside the textbook way and beside other libraries: docs/performance.md.

python benchmark.py --stage pretrain --rounds 10 --output pretrain.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import arguments
import engine
import modeling_finetune
import modeling_pretrain
import modeling_vqkd
from benchmarks.input_images import (
    CLASSES,
    PHOTO,
    masks,
    photos,
    pretraining_view,
    random_batch,
    random_masks,
)
from benchmarks.peer_models import Settings, Transformers, Worker, timm_model
from benchmarks.plain_models import (
    PlainClassifier,
    PlainPretraining,
    PlainQuantizer,
    PlainViews,
    PlainVQKD,
    read_plainly,
)
from benchmarks.timing import (
    PHASES,
    Clock,
    Contender,
    Contest,
    Local,
    Mark,
    bytes_of,
    hold,
    matmul_speed,
    table,
)
from benchmarks.training_steps import (
    ADAMW,
    CLIP_GRAD,
    MarkedTokens,
    Ours,
    classification_loss,
    enliven,
    inference,
    textbook,
)
from checkpoint_io import checkpoints
from data_pipeline.samplers import ResumableSampler, build_loader, close, collate
from datasets import ImageFiles
from engine_for_finetuning import FinetuningStage
from engine_for_pretraining import PretrainingStage
from engine_for_vqkd import TokenizerStage
from errors import UserError, report_user_errors
from norm_ema_quantizer import NormEMAVectorQuantizer
from run_state import Run
from runtime import distributed
from runtime.distributed import log
from transforms import HALF_MEAN, HALF_STD, TokenizerViews, finetuning_view
from utils import seed_all, seeded
from vit_backbone import SIZES, cast_frozen
from vqkd_teachers import build_teacher

CLOSE = 1e-4  # losses in fp32, relative to a loss above 1


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Speed of the stages beside the textbook way and other libraries")
    add = parser.add_argument
    add("--stage", nargs="+", default=list(STAGES), choices=list(STAGES), help="what to measure")
    add("--device", default="cuda", help="cuda (falls back to cpu) or cpu")
    add("--model", default="base", choices=list(SIZES), help="row of vit_backbone.SIZES for all stages")
    add(
        "--batch_size",
        default=8,
        type=arguments.large_count,
        help="images of one step; the quantizer's stage takes 8 times as many",
    )
    add(
        "--amp_dtype",
        default="auto",
        choices=["auto", "bf16", "fp32"],
        help="auto: bf16 where the device computes in it",
    )
    add(
        "--rounds",
        default=8,
        type=arguments.positive,
        help="turns of each contender; medians and ranges are over these",
    )
    add("--warmup", default=2, type=arguments.positive, help="rounds before those")
    add("--teacher", default="hog", help="of the vqkd stage: hog, or timm:<name> with random weights")
    add(
        "--num_workers",
        default=0,
        type=arguments.not_negative,
        help="of the loader with which the wait for data is measured",
    )
    add("--compile", action="store_true", help="torch.compile for our model, not for the others")
    add("--output", default="", type=arguments.expand_home, help="JSON file for all that was measured")
    add("--seed", default=0, type=arguments.seed, help="of weights, images and masks")
    return parser


def tolerance(run: Run) -> float | None:
    return None if run.precision.dtype else CLOSE


def variant(table: dict[str, Any], size: str, ending: str = "") -> str:
    """The model of that size in a stage's table, or the base one where a stage has none
    (its tokenizer serves all).
    """
    rows = {name: row.size for name, row in table.items() if name.endswith(ending)}
    return next((name for wanted in (size, "base") for name, row in rows.items() if row == wanted), "")


# ── Stages ──


def pretraining(args: argparse.Namespace, run: Run) -> Iterator[Contest]:
    """BEiT v2's step: frozen tokenizer, masked ViT with the CLS head, both losses."""
    name = variant(modeling_pretrain.MODELS, args.model, "_cls_pt")
    depth = SIZES[modeling_pretrain.MODELS[name].size].depth
    bias = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "init_values": 0.1}
    model = modeling_pretrain.create_model(name, early_layers=depth * 3 // 4, head_layers=2, **bias).to(
        run.device
    )
    tokenizer_name = variant(modeling_vqkd.MODELS, args.model)
    size = model.patch_embed.img_size[0]
    tokenizer = modeling_vqkd.create_model(tokenizer_name, as_tokenizer=True, img_size=size).to(run.device)
    enliven(model)
    plain, plain_tokenizer = PlainPretraining(model), PlainVQKD(tokenizer)
    cast_frozen(tokenizer.encoder, run.precision.dtype)
    target = MarkedTokens(tokenizer, model.vocab_size, run.device)
    view = pretraining_view(size)
    stage = PretrainingStage(target, run.device, run.precision, ImageFiles([], view), (HALF_MEAN, HALF_STD))
    target.ours = ours = Ours(stage, model, run)
    batch = random_batch(args.batch_size, size, run.device) | {
        "mask": random_masks(args.batch_size, size // 16, args.seed)
    }
    flops = ours.flops(batch)

    def loss_of(batch: dict[str, Any], mark: Mark) -> Tensor:
        masked = batch["mask"].to(run.device)
        with torch.no_grad():
            codes = plain_tokenizer.codes_of(batch["tokenizer_image"])[masked]
        mark("tokenizer")
        return torch.stack(
            [cross_entropy(logits.float(), codes) for logits in plain(batch["image"], masked)]
        ).sum()

    keeps = functools.partial(bytes_of, model, tokenizer, optimizer=ours.state.optimizer)
    contenders = [
        Local("ours", ours, run.device, keeps),
        textbook(plain, run, loss_of, beside=plain_tokenizer),
    ]
    yield Contest(f"pretrain {name}", contenders, batch, args.batch_size, tolerance(run), flops, view=view)


def vqkd(args: argparse.Namespace, run: Run) -> Iterator[Contest]:
    """Training the tokenizer: encoder, quantizer with its moving average, decoder, frozen teacher."""
    name = variant(modeling_vqkd.MODELS, args.model)
    size = modeling_vqkd.MODELS[name].img_size
    weights = None if args.teacher == "hog" else "random"
    teacher = build_teacher(args.teacher, weights, grid=size // 16).to(run.device)
    model = modeling_vqkd.create_model(name, teacher=teacher, quantize_kmeans_init=False).to(run.device)
    batch = random_batch(args.batch_size, size, run.device)
    batch["image"] = batch["tokenizer_image"]
    plain = PlainVQKD(model, teacher)
    cast_frozen(teacher, run.precision.dtype)
    stage = TokenizerStage(
        model,
        teacher,
        run.device,
        run.precision,
        ImageFiles([], view := TokenizerViews(size, 0.2, 0.0, "bicubic")),
    )
    ours = Ours(stage, model, run)
    flops = Ours(
        TokenizerStage(probe := copy.deepcopy(model), teacher, run.device, run.precision, stage.dataset),
        probe,
        run,
    ).flops(batch)
    del probe
    targets = teacher.targets

    def marked(x: Tensor) -> Tensor:
        features = targets(x)
        ours.mark("tokenizer")
        return features

    teacher.targets = marked  # type: ignore[method-assign,assignment]
    keeps = functools.partial(bytes_of, model, teacher, optimizer=ours.state.optimizer)
    textbook_way = textbook(plain, run, lambda batch, mark: plain(batch["image"], mark))
    contenders = [Local("ours", ours, run.device, keeps), textbook_way]
    yield Contest(
        f"vqkd {name}, teacher {args.teacher}",
        contenders,
        batch,
        args.batch_size,
        tolerance(run),
        flops,
        view=view,
    )


def finetuning(args: argparse.Namespace, run: Run) -> Iterator[Contest]:
    """Inference, then a training step of the classifier with a bias table in every block,
    as released weights have it.
    """
    name = variant(modeling_finetune.MODELS, args.model)
    bias = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}
    model = modeling_finetune.create_model(name, num_classes=CLASSES, **bias).to(run.device)
    enliven(model)
    size = model.patch_embed.img_size[0]
    batch = random_batch(args.batch_size, size, run.device)
    settings = Settings(run.device, "bf16" if run.precision.dtype else "fp32", ADAMW, CLIP_GRAD)
    plain, theirs = PlainClassifier(model), timm_model(model).to(run.device)
    ours = Ours(FinetuningStage(run.device, run.precision), model, run)
    flops = ours.flops(batch)
    worker, absent = None, {}
    if importlib.util.find_spec("transformers") is None:
        absent["transformers"] = "not installed"
    else:
        worker = Worker(model, batch, settings)
    try:
        models = {"ours": ours.state.runner, "plain": plain, "timm": theirs}
        contenders: list[Contender] = [inference(label, module, run) for label, module in models.items()]
        contenders += [Transformers(worker, "infer")] if worker else []
        yield Contest(
            f"finetune {name}, inference",
            contenders,
            batch,
            args.batch_size,
            tolerance(run),
            flops // 3,
            absent,
        )
        keeps = functools.partial(bytes_of, model, optimizer=ours.state.optimizer)
        contenders = [Local("ours", ours, run.device, keeps)]
        for label, module in (("plain", plain), ("timm", theirs)):
            contenders.append(
                textbook(module, run, classification_loss(module), name=label, fused=label == "timm")
            )
        contenders += [Transformers(worker, "step")] if worker else []
        model.train()
        view = finetuning_view(size, HALF_MEAN, HALF_STD)
        yield Contest(
            f"finetune {name}, step", contenders, batch, args.batch_size, tolerance(run), flops, absent, view
        )
    finally:
        if worker:
            worker.close()


def quantizer(args: argparse.Namespace, run: Run) -> Iterator[Contest]:
    """Lookup in 8192 codes of dim 32 and the codebook's update, without networks around them."""
    images = 8 * args.batch_size
    ours = NormEMAVectorQuantizer(8192, 32).to(run.device).train()
    plain = PlainQuantizer(ours).train()
    batch = {"z": torch.randn(images, 32, 14, 14, device=run.device)}

    def work_of(module: nn.Module) -> Callable[[dict[str, Any], Mark], Tensor]:
        def work(batch: dict[str, Any], mark: Mark) -> Tensor:
            loss = module(batch["z"])[1]
            mark("forward")
            return loss

        return work

    contenders = [
        Local(label, work_of(module), run.device, functools.partial(bytes_of, module))
        for label, module in (("ours", ours), ("plain", plain))
    ]
    yield Contest("quantizer 8192 x 32", contenders, batch, images, CLOSE)


def data(args: argparse.Namespace, run: Run) -> Iterator[Contest]:
    """JPEG files of 500 x 375 to both views and a mask, on one core."""
    size = modeling_pretrain.MODELS[variant(modeling_pretrain.MODELS, args.model, "_cls_pt")].img_size
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        paths = photos(Path(folder), args.batch_size)
        files = ImageFiles([(path, None) for path in paths], pretraining_view(size), args.seed)
        views = PlainViews(size, size, 0.2, 0.4, HALF_MEAN, HALF_STD, masks(size // 16))

        def plainly(index: int) -> dict[str, Any]:
            with seeded(args.seed, 0, index):
                return views(read_plainly(paths[index]))

        def work_of(
            sample: Callable[[int], dict[str, Any]], finish: Callable[[dict[str, Any]], dict[str, Any]]
        ) -> Callable[[dict[str, Any], Mark], Tensor]:
            def work(batch: dict[str, Any], mark: Mark) -> Tensor:
                finished = finish(collate([sample(index) | {"failed": []} for index in range(len(paths))]))
                mark("data")
                values = [finished[name].double().mean() for name in ("image", "tokenizer_image", "mask")]
                return torch.stack(values).sum()

            return work

        torch.set_num_threads(1)
        try:
            cpu = torch.device("cpu")
            ours, plain = work_of(files.__getitem__, files.finish), work_of(plainly, finish=dict)
            contenders = [Local("ours", ours, cpu), Local("plain", plain, cpu)]
            yield Contest(
                f"data {PHOTO[0]} x {PHOTO[1]} JPEG to two views of {size}", contenders, {}, len(paths), CLOSE
            )
        finally:
            torch.set_num_threads(threads)


STAGES = {"pretrain": pretraining, "vqkd": vqkd, "finetune": finetuning, "quantizer": quantizer, "data": data}


def through_loader(contest: Contest, args: argparse.Namespace, run: Run) -> dict[str, float]:
    """Our step fed by files and the training's own loader, medians by phase: what turns
    cannot show is the wait for data, because workers would read on while the others
    take theirs.
    """
    assert contest.view is not None
    step = contest.contenders[0]
    with tempfile.TemporaryDirectory() as folder:
        paths = photos(Path(folder), 2 * args.batch_size)
        files = ImageFiles(
            [(path, index % CLASSES) for index, path in enumerate(paths)], contest.view, args.seed
        )
        sampler = ResumableSampler(len(files), args.batch_size, 1, 0, 1, args.seed)
        loader = build_loader(files, sampler, args.num_workers, run.device.type == "cuda", persistent=True)
        taken = []
        for epoch in range(1 + -(-args.rounds // 2)):
            sampler.set_position(epoch)
            batches = iter(loader)
            for _ in range(sampler.steps_per_epoch):
                clock = Clock(run.device)
                batch = files.finish(engine.to_device(next(batches), run.device))
                clock.mark("data")
                taken.append(clock.read() | step.turn(batch).ms)
        close(loader)
    return {phase: statistics.median(ms.get(phase, 0.0) for ms in taken[2:]) for phase in PHASES}


# ── Report ──


def machine(run: Run, side: int) -> tuple[dict[str, Any], float]:
    dtype = run.precision.dtype or torch.float32
    speed = matmul_speed(run.device, dtype, side)
    cuda = run.device.type == "cuda"
    facts = {
        "device": torch.cuda.get_device_name(run.device)
        if cuda
        else f"{processor()}, {torch.get_num_threads()} threads",
        "precision": str(run.precision),
        "matmul_tflops": speed / 1e12,
        "matmul_side": side,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
    }
    return facts, speed


def processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def measure(contest: Contest, args: argparse.Namespace, run: Run, matmul: float) -> dict[str, Any]:
    rows = hold(contest, args.rounds, args.warmup, matmul)
    log.info("")
    log.info(f"{contest.name}: {contest.images} images a step, {args.rounds} rounds")
    for line in table(rows):
        log.info(line)
    for name, reason in contest.absent.items():
        log.info(f"{name:14}{reason}")
    result: dict[str, Any] = {
        "name": contest.name,
        "images": contest.images,
        "flops": contest.flops,
        "absent": contest.absent,
    }
    result["rows"] = [dataclasses.asdict(row) for row in rows]
    if contest.view is not None:
        result["through_loader"] = ms = through_loader(contest, args, run)
        spent = ", ".join(f"{phase} {value:.1f}" for phase, value in ms.items())
        log.info(f"ours from files, {args.num_workers} workers, ms: {spent}")
    return result


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    launch, device = distributed.start(args.device)
    if launch.world_size > 1:
        raise UserError("the benchmark is for one process: start it without a launcher")
    run = Run(args, launch, device, distributed.choose_precision(args.amp_dtype, device))
    emulated = device.type == "cpu" and run.precision.dtype and not distributed.cpu_computes_in_bf16()
    facts, matmul = machine(run, side=8192 if device.type == "cuda" else 256 if emulated else 2048)
    log.info(
        ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in facts.items()
        )
    )
    results = []
    for stage in args.stage:
        seed_all(args.seed, device)
        for contest in STAGES[stage](args, run):
            results.append({"stage": stage, **measure(contest, args, run, matmul)})
    if args.output:
        Path(args.output).write_text(
            json.dumps(
                {"machine": facts, "flags": checkpoints.to_plain_data(args.plain()), "contests": results},
                indent=1,
            )
            + "\n"
        )
        log.info("")
        log.info(f"written to {args.output}")


if __name__ == "__main__":
    main()
