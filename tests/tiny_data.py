"""Tiny images and the settings of the data sets of all stages."""

from argparse import Namespace
from typing import Any

import numpy as np
from PIL import Image

from run_beitv2_pretraining import build_data
from run_vqkd_training import build_dataset as build_vqkd_dataset
from run_vqkd_training import build_held_out_dataset


def write_image(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(seed)
    Image.fromarray(rng.randint(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    ).save(path)
    return str(path)


def photo(width=90, height=70, seed=0) -> Image.Image:
    """Smooth colors with some noise: no two crops look alike."""
    rng = np.random.RandomState(seed)
    small = Image.fromarray(rng.randint(0, 256, (5, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_classes(root, counts):
    for name, count in counts.items():
        for i in range(count):
            write_image(root / name / f"{i:02}.jpg", seed=i)
    return str(root)


def data_args(root, **changed):
    flags: dict[str, Any] = {
        "data_path": str(root),
        "eval_data_path": "",
        "data_set": "image_folder",
        "image_folder_class_index_file": None,
        "nb_classes": 0,
        "label_fraction": 1.0,
        "download": False,
        "seed": 0,
        "model": "beit_base_patch16_224_8k_vocab_cls_pt",
        "input_size": 64,
        "second_input_size": 32,
        "min_crop_scale": 0.2,
        "color_jitter": 0.4,
        "train_interpolation": "bicubic",
        "second_interpolation": "bicubic",
        "imagenet_default_mean_and_std": False,
        "in_chans": 3,
        "image_range": None,
        "mean_std": None,
        "num_mask_patches": None,
        "min_mask_patches_per_block": None,
        "max_mask_patches_per_block": None,
        "mask_type": "block",
        "no_mask": False,
        "aa": "rand-m9-mstd0.5-inc1",
        "reprob": 0.25,
        "remode": "pixel",
        "recount": 1,
        "crop_pct": None,
        "vflip": 0.0,
        "data_pipeline": "exact",
        "augment_on_device": False,
        "target": "tokens",
        "tokenizer_model": "vqkd_encoder_base_decoder_3x768x12_clip",
    }
    return Namespace(**{**flags, **changed})


def build_pretraining_dataset(args, held_out=""):
    train, evaluation = build_data(Namespace(**{**vars(args), "eval_data_path": held_out}))
    return evaluation if held_out else train


def vqkd_dataset(args, train):
    dataset = build_vqkd_dataset(args) if train else build_held_out_dataset(args)
    assert dataset is not None
    return dataset


def shard_pattern(out):
    return f"{out}/{{000000..000004}}.tar"
