"""The contests that benchmark.py holds: each builds the contenders of one stage.

Every function yields contests one after the other, and may give back what they hold
(files, another process) when it is asked for the next one.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import modeling_finetune
import modeling_pretrain
import modeling_vqkd
from benchmarks.input_images import (
    CLASSES,
    PHOTO,
    masks,
    pretraining_view,
    random_batch,
    random_masks,
    write_photos,
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
from benchmarks.timing import Contender, Contest, Local, Mark, bytes_of
from benchmarks.training_steps import (
    ADAMW,
    CLIP_GRAD,
    MarkedTokens,
    Ours,
    Workload,
    classification_loss,
    inference,
    randomize_zeros,
    textbook,
)
from data_pipeline.crops import TokenizerViews
from data_pipeline.files import collate
from datasets import ImageFiles
from engine_for_finetuning import FinetuningStage
from engine_for_pretraining import PretrainingStage
from engine_for_vqkd import TokenizerStage
from layers.token_subset import list_masked
from norm_ema_quantizer import NormEMAVectorQuantizer
from run_state import Run
from runtime.seeding import seeded
from transforms import HALF_MEAN, HALF_STD, finetuning_view
from vit_backbone import SIZES, cast_frozen
from vqkd_teachers import build_teacher

CLOSE = 1e-4  # losses in fp32, relative to a loss above 1


def tolerance(run: Run) -> float | None:
    return None if run.precision.dtype else CLOSE


def variant(table: dict[str, Any], size: str, ending: str = "") -> str:
    """The model of that size in a stage's table, or the base one if there is none of
    that size.
    """
    rows = {name: row.size for name, row in table.items() if name.endswith(ending)}
    return next((name for wanted in (size, "base") for name, row in rows.items() if row == wanted), "")


def pretraining(workload: Workload, run: Run) -> Iterator[Contest]:
    """BEiT v2's step: frozen tokenizer, masked ViT with the CLS head, both losses."""
    name = variant(modeling_pretrain.MODELS, workload.model, "_cls_pt")
    depth = SIZES[modeling_pretrain.MODELS[name].size].depth
    bias = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "init_values": 0.1}
    model = modeling_pretrain.create_model(name, early_layers=depth * 3 // 4, head_layers=2, **bias).to(
        run.device
    )
    tokenizer_name = variant(modeling_vqkd.MODELS, workload.model)
    size, patch_size, grid = model.patch_embed.img_size[0], model.patch_size, model.patch_embed.patch_shape[0]
    second_size = grid * modeling_vqkd.PATCH_SIZE
    tokenizer = modeling_vqkd.create_model(tokenizer_name, as_tokenizer=True, img_size=second_size)
    tokenizer.to(run.device)
    randomize_zeros(model)
    plain, plain_tokenizer = PlainPretraining(model), PlainVQKD(tokenizer)
    cast_frozen(tokenizer.encoder, run.precision.dtype)
    tokenizer.drop_decoder()
    target = MarkedTokens(tokenizer, model.vocab_size, run.device)
    view = pretraining_view(size, patch_size)
    stage = PretrainingStage(target, run.device, run.precision, ImageFiles([], view), (HALF_MEAN, HALF_STD))
    target.ours = ours = Ours(stage, model, run)
    mask = random_masks(workload.batch_size, grid, workload.seed)
    batch = random_batch(workload.batch_size, size, run.device, second_size)
    batch |= {"mask": mask, "masked": list_masked(mask).to(run.device)}
    flops = ours.flops(batch)
    ours.compile(workload, tokenizer)

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
    yield Contest(
        f"pretrain {name}", contenders, batch, workload.batch_size, tolerance(run), flops, view=view
    )


def vqkd(workload: Workload, run: Run) -> Iterator[Contest]:
    """Training the tokenizer: encoder, quantizer with its moving average, decoder,
    frozen teacher.
    """
    name = variant(modeling_vqkd.MODELS, workload.model)
    size = modeling_vqkd.MODELS[name].img_size
    weights = None if workload.teacher == "hog" else "random"
    teacher = build_teacher(workload.teacher, weights, grid=size // modeling_vqkd.PATCH_SIZE).to(run.device)
    model = modeling_vqkd.create_model(name, teacher=teacher, quantize_kmeans_init=False).to(run.device)
    batch = random_batch(workload.batch_size, size, run.device)
    batch["image"] = batch["tokenizer_image"]
    plain = PlainVQKD(model, teacher)
    cast_frozen(teacher, run.precision.dtype)
    view = TokenizerViews(size, 0.2, 0.0, "bicubic")
    stage = TokenizerStage(model, teacher, run.device, run.precision, ImageFiles([], view))
    ours = Ours(stage, model, run)
    spare = copy.deepcopy(model)  # counting must not change the codebook
    spare_stage = TokenizerStage(spare, teacher, run.device, run.precision, stage.dataset)
    flops = Ours(spare_stage, spare, run).flops(batch)
    del spare, spare_stage
    ours.compile(workload, teacher)
    targets = teacher.targets

    def marked(x: Tensor) -> Tensor:
        features = targets(x)
        ours.mark("tokenizer")
        return features

    teacher.targets = marked  # type: ignore[method-assign,assignment]
    keeps = functools.partial(bytes_of, model, teacher, optimizer=ours.state.optimizer)
    contenders = [
        Local("ours", ours, run.device, keeps),
        textbook(plain, run, lambda batch, mark: plain(batch["image"], mark)),
    ]
    title = f"vqkd {name}, teacher {workload.teacher}"
    yield Contest(title, contenders, batch, workload.batch_size, tolerance(run), flops, view=view)


def finetuning(workload: Workload, run: Run) -> Iterator[Contest]:
    """Inference, then a training step of the classifier.

    It has a bias table in every block, as the released weights have.
    """
    name = variant(modeling_finetune.MODELS, workload.model)
    bias = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}
    model = modeling_finetune.create_model(name, num_classes=CLASSES, **bias).to(run.device)
    randomize_zeros(model)
    size = model.patch_embed.img_size[0]
    batch = random_batch(workload.batch_size, size, run.device)
    settings = Settings(run.device, run.precision.dtype, ADAMW, CLIP_GRAD)
    plain, theirs = PlainClassifier(model), timm_model(model).to(run.device)
    ours = Ours(FinetuningStage(run.device, run.precision), model, run)
    flops = ours.flops(batch)
    ours.compile(workload)
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
            workload.batch_size,
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
            f"finetune {name}, step",
            contenders,
            batch,
            workload.batch_size,
            tolerance(run),
            flops,
            absent,
            view,
        )
    finally:
        if worker:
            worker.close()


def quantization(name: str, quantizer: nn.Module, run: Run) -> Local:
    def work(batch: dict[str, Any], mark: Mark) -> Tensor:
        loss = quantizer(batch["z"])[1]
        mark("forward")
        return loss

    return Local(name, work, run.device, functools.partial(bytes_of, quantizer))


def quantizer(workload: Workload, run: Run) -> Iterator[Contest]:
    """Lookup in 8192 codes of dim 32 and the update of the codebook, without a
    network.
    """
    images = 8 * workload.batch_size
    ours = NormEMAVectorQuantizer(8192, 32).to(run.device).train()
    plain = PlainQuantizer(ours).train()
    batch = {"z": torch.randn(images, 32, 14, 14, device=run.device)}
    contenders = [quantization(label, module, run) for label, module in (("ours", ours), ("plain", plain))]
    yield Contest("quantizer 8192 x 32", contenders, batch, images, CLOSE)


def data(workload: Workload, run: Run) -> Iterator[Contest]:
    """JPEG files of 500 x 375 to both views and a mask, on one core."""
    row = modeling_pretrain.MODELS[variant(modeling_pretrain.MODELS, workload.model, "_cls_pt")]
    view, grid = pretraining_view(row.img_size, row.patch_size), row.img_size // row.patch_size
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder), workload.batch_size)
        files = ImageFiles([(path, None) for path in paths], view, workload.seed)
        sizes = (row.img_size, grid * modeling_vqkd.PATCH_SIZE)
        views = PlainViews(*sizes, 0.2, 0.4, HALF_MEAN, HALF_STD, masks(grid))

        def read_and_transform(index: int) -> dict[str, Any]:
            with seeded(workload.seed, 0, index):
                return views(read_plainly(paths[index]))

        def work_of(
            sample: Callable[[int], dict[str, Any]],
            device_transform: Callable[[dict[str, Any]], dict[str, Any]],
        ) -> Callable[[dict[str, Any], Mark], Tensor]:
            def work(batch: dict[str, Any], mark: Mark) -> Tensor:
                moved = device_transform(
                    collate([sample(index) | {"failed": []} for index in range(len(paths))])
                )
                mark("data")
                values = [moved[name].double().mean() for name in ("image", "tokenizer_image", "mask")]
                return torch.stack(values).sum()

            return work

        torch.set_num_threads(1)
        try:
            cpu = torch.device("cpu")
            ours, plain = (
                work_of(files.__getitem__, files.device_transform),
                work_of(read_and_transform, device_transform=dict),
            )
            contenders = [Local("ours", ours, cpu), Local("plain", plain, cpu)]
            name = f"data {PHOTO[0]} x {PHOTO[1]} JPEG to two views of {row.img_size}"
            yield Contest(name, contenders, {}, len(paths), CLOSE)
        finally:
            torch.set_num_threads(threads)
