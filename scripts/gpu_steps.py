"""What scripts/check_gpu.py runs in processes of their own: each stage, started as a user
starts it, for two epochs of one step, in one precision or way; and what a step of it
holds in memory.

    python scripts/gpu_steps.py bf16 out/check --device cuda

Every mode trains on the same images from the same weights without random draws on the
device, so that losses can be compared with those of the mode `reference` (CPU, fp32),
which comes first: it leaves the weights from which the linear probe of all modes starts.
Writes FOLDER/MODE.json, stage by stage.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import arguments  # noqa: E402
import modeling_vqkd  # noqa: E402
import run_state  # noqa: E402
from benchmarks.input_images import PHOTO, write_photos  # noqa: E402
from benchmarks.timing import peak_growth  # noqa: E402
from errors import report_user_errors  # noqa: E402
from runtime import compilation  # noqa: E402
from stages import log_of  # noqa: E402
from vit_backbone import SIZES  # noqa: E402

SCRIPTS = {
    "vqkd": "run_vqkd_training",
    "pretrain": "run_beitv2_pretraining",
    "finetune": "run_class_finetuning",
    "segment": "run_segmentation_finetuning",
    "linear": "run_linear_eval",
}
# what a mode adds to the flags (HALF: bf16, on older cards fp16), and the stages that have it
MODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "reference": ("--amp_dtype fp32 --device cpu", tuple(SCRIPTS)),
    "fp32": ("--amp_dtype fp32", tuple(SCRIPTS)),
    "bf16": ("--amp_dtype bf16", tuple(SCRIPTS)),
    "fp16": ("--amp_dtype fp16", tuple(SCRIPTS)),
    "compiled": ("--amp_dtype HALF --compile", ("vqkd", "pretrain", "finetune", "segment")),
    "fsdp": ("--amp_dtype HALF --fsdp", ("pretrain", "finetune")),
}
MEMORY = ("vqkd", "pretrain", "finetune")
CODES, CODE_DIM = {"demo": 64}, 32


def write_data(folder: Path, size: str, images: int) -> None:
    """FOLDER/photos/{train,val}/{a,b}/*.jpg, the pairs of ADE20K's layout, and a tokenizer of random
    weights.
    """
    pairs = folder / "pairs"
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (pairs / kind / split).mkdir(parents=True)
        for number, path in enumerate(write_photos(pairs / "images" / split, 2)):
            mask = np.full(PHOTO[::-1], 1 + number, dtype=np.uint8)
            mask[:, PHOTO[0] // 3 :] = 3
            Image.fromarray(mask).save(pairs / "annotations" / split / f"{Path(path).stem}.png")
    for split in ("train", "val"):
        for label in "ab":
            (folder / "photos" / split / label).mkdir(parents=True)
            write_photos(folder / "photos" / split / label, images // 2)
    torch.manual_seed(1)
    options = {"n_code": CODES.get(size, 8192), "code_dim": CODE_DIM, "as_tokenizer": True}
    model = modeling_vqkd.create_model(tokenizer_name(size), img_size=side(size), **options)
    torch.save({"model": model.state_dict()}, folder / "tokenizer.pth")


def side(size: str) -> int:
    return 64 if size == "demo" else 224


def tokenizer_name(size: str) -> str:
    return next(name for name, row in modeling_vqkd.MODELS.items() if row.size == size)


def flags_of(stage: str, folder: Path, size: str, batch: int, looks: bool = True) -> list[str]:
    """The flags that all modes share, without `output_dir`: nothing is drawn at random on
    the device. `folder`: of `write_data`. `looks`: pretraining is measured by k-NN.
    """
    photos, codes, pixels = folder / "photos/train", CODES.get(size, 8192), side(size)
    shape = f"patch16_{128 if size == 'demo' else 224}"
    common = f"--batch_size {batch} --num_workers 0 --clip_grad 3 --lr 3e-4"
    epochs = "--epochs 2 --warmup_epochs 0"
    look = f"--knn_freq 1 --knn_data_path {folder}/photos" if looks else ""
    lines = {
        "vqkd": f"--model {tokenizer_name(size)} --teacher_model_type hog --codebook_n_emd {codes} "
        f"--codebook_emd_dim {CODE_DIM} --input_size {pixels} --data_path {photos} {epochs} {common}",
        "pretrain": f"--model beit_{size}_{shape}_8k_vocab_cls_pt --early_layers 4 --head_layers 1 "
        f"--tokenizer_model {tokenizer_name(size)} --tokenizer_weight {folder}/tokenizer.pth "
        f"--codebook_size {codes} --codebook_dim {CODE_DIM} --input_size {pixels} --data_path {photos} "
        f"--layer_scale_init_value 0.1 {look} {epochs} {common} --drop_path 0",
        "finetune": f"--model beit_{size}_{shape} --data_set image_folder --data_path {photos} "
        f"--eval_data_path {photos} --input_size {pixels} --aa none --reprob 0 --model_ema {epochs} "
        f"{common} --drop_path 0",
        "segment": f"--model upernet_beit_{size}_patch16 --data_path {folder}/pairs --reduce_zero_label "
        f"--nb_classes 3 --input_size {pixels} --max_steps 2 --steps_per_epoch 1 --warmup_steps 0 "
        f"{common} --drop_path 0 --batch_size 2",
        "linear": f"--finetune {folder}/reference/pretrain/checkpoint.pth --data_set image_folder "
        f"--data_path {photos} --eval_data_path {photos} --input_size {pixels} --epochs 2 "
        f"--batch_size {batch} --num_workers 0 --lr 0.001",
    }
    return lines[stage].split()


@contextlib.contextmanager
def without_dropout() -> Iterator[None]:
    """A segmentation head drops channels, others on a GPU than on a CPU."""

    def same(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x

    with (
        mock.patch("torch.nn.functional.dropout", same),
        mock.patch("torch.nn.functional.dropout2d", same),
    ):
        yield


@contextlib.contextmanager
def shards_on_one_rank() -> Iterator[None]:
    """As under torchrun with one process, except that --fsdp shards: into one share."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    sharded = property(lambda run: run.options.fsdp)
    with (
        mock.patch.dict(os.environ, place | {"MASTER_PORT": str(port)}),
        mock.patch.object(run_state.Run, "is_sharded", sharded),
    ):
        yield


def entry(stage: str) -> Callable[[list[str]], None]:
    """Its `main`, whose errors are raised instead of printed."""
    return importlib.import_module(SCRIPTS[stage]).main.__wrapped__


def has_bf16(device: str) -> bool:
    return device == "cpu" or torch.cuda.get_device_capability()[0] >= 8


def take_steps(stage: str, mode: str, folder: Path, size: str, batch: int, device: str) -> dict[str, Any]:
    """Loss and norm of the gradient of each of the two steps."""
    out = folder / mode / stage
    half = "bf16" if has_bf16(device) else "fp16"
    more = f"--device {device} {MODES[mode][0].replace('HALF', half)} --output_dir {out}".split()
    around = shards_on_one_rank() if mode == "fsdp" else contextlib.nullcontext()
    with around, without_dropout():
        entry(stage)([*flags_of(stage, folder, size, batch), *more])
    lines = log_of(out)
    return {
        "losses": [line["train_loss"] for line in lines],
        "grad_norms": [finite(line.get("train_grad_norm")) for line in lines],
    }


def finite(value: Any) -> float | None:
    """None in place of the norm of a step that was skipped, which JSON has no word
    for.
    """
    return float(value) if value is not None and math.isfinite(float(value)) else None


def measure_peak(stage: str, folder: Path, size: str, batch: int, device: str) -> dict[str, Any]:
    """Most bytes of tensors at once while the stage trains two steps in the precision of
    --amp_dtype auto, as the allocator counts them; and the command line.
    """
    flags = [*flags_of(stage, folder, size, batch, looks=False), "--device", device]
    peak = peak_growth(torch.device(device), lambda: entry(stage)(flags))
    return {"script": f"{SCRIPTS[stage]}.py", "flags": flags, "peak_bytes": peak}


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("The steps that scripts/check_gpu.py compares", "bf16 out/check")
    parser.add_argument("mode", choices=[*MODES, "memory"], help="precision or way; memory: a step's peak")
    parser.add_argument("folder", type=arguments.expand_home, help="where data and runs are")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="where it computes")
    parser.add_argument("--size", default="small", choices=[*SIZES], help="of the networks")
    parser.add_argument("--batch_size", default=8, type=arguments.positive, help="images of a step")
    return parser


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    folder = Path(args.folder)
    if args.mode in ("reference", "memory"):
        write_data(folder / "memory" if args.mode == "memory" else folder, args.size, args.batch_size)
    if args.device == "cpu":  # translation to C++ would take minutes
        compilation.BACKEND = "eager"
    stages = MEMORY if args.mode == "memory" else MODES[args.mode][1]
    results: dict[str, Any] = {}
    for stage in stages:
        try:
            if args.mode == "memory":
                results[stage] = measure_peak(
                    stage, folder / "memory", args.size, args.batch_size, args.device
                )
            else:
                results[stage] = take_steps(stage, args.mode, folder, args.size, args.batch_size, args.device)
        except (Exception, SystemExit) as error:  # goes into the report; the other stages are tried
            results[stage] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        (folder / f"{args.mode}.json").write_text(json.dumps(results))
        gc.collect()  # what a stage leaves would count as the next one's


if __name__ == "__main__":
    main()
