"""Tiny data, a tiny tokenizer and flags with which every entry runs in a second or
two.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Container
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import modeling_pretrain
import modeling_vqkd


def as_flags(**values: object) -> list[str]:
    """The words of a command line: as_flags(lr=1, no_mask=True) is ["--lr", "1",
    "--no_mask"].
    """
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


SIZE = as_flags(input_size=32, device="cpu", amp_dtype="fp32", num_workers=0, image_freq=0)
STUDENT = "beit_demo_patch16_128_8k_vocab_cls_pt"
TOKENIZER = "vqkd_encoder_demo_decoder_1x128x4_hog"


def photos(folder: Path, per_class: int = 8, classes: str = "ab", size: int = 40) -> Path:
    """class/number.jpg: each class its own orientation of stripes, each photo its own
    phase.
    """
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            rng = np.random.RandomState(1000 * number + index)
            wave = np.sin(np.arange(size) * 0.6 + rng.rand() * 6)[None].repeat(size, 0) * 90 + 128
            pixels = (wave if number % 2 else wave.T)[..., None] + rng.randn(size, size, 3) * 10
            Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / name / f"{index}.jpg")
    return folder


def labeled_pixels(folder: Path, images: int = 6, classes: int = 3, size: tuple[int, int] = (40, 56)) -> Path:
    """ADE20K's layout: noise around one color per class, and masks of rectangles; label
    0 is nobody's, classes count from 1.
    """
    for split, count in (("training", images), ("validation", 3)):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            rng = np.random.RandomState(100 * count + index)
            mask = np.full(size, 1 + index % classes, dtype=np.uint8)
            mask[:, size[1] // 2 :] = 1 + (index + 1) % classes
            mask[:3] = 0
            colors = np.random.RandomState(0).randint(40, 215, (classes + 1, 3))
            pixels = (colors[mask] + rng.randn(*size, 3) * 8).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / "images" / split / f"{index}.jpg")
            Image.fromarray(mask).save(folder / "annotations" / split / f"{index}.png")
    return folder


def tokenizer(path: Path) -> Path:
    """A tokenizer of random weights for 32-pixel images, 16 codes of dim 8."""
    torch.manual_seed(1)
    model = modeling_vqkd.create_model(TOKENIZER, img_size=32, n_code=16, code_dim=8, as_tokenizer=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, path)
    return path


def student(path: Path, name: str = STUDENT, **flags: object) -> Path:
    """A pretraining checkpoint of random weights for 32-pixel images; `flags` are those
    it says it was trained with.
    """
    torch.manual_seed(2)
    more = {"early_layers": 4, "head_layers": 1, "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True}
    more["in_chans"] = flags.get("in_chans", 3)
    model = modeling_pretrain.create_model(name, img_size=32, vocab_size=16, init_values=0.1, **more)
    torch.save({"model": model.state_dict(), "args": flags}, path)
    return path


def vqkd_flags(data: Path, out: Path, *more: str) -> list[str]:
    flags = as_flags(data_path=data, output_dir=out, model=TOKENIZER, teacher_input_size=32)
    codes = as_flags(codebook_n_emd=16, codebook_emd_dim=8, batch_size=4, lr=1e-3)
    return [*flags, *codes, *SIZE, *as_flags(epochs=2, warmup_epochs=1), *more]


def pretraining_flags(data: Path, out: Path, tokenizer_path: Path, *more: str) -> list[str]:
    flags = as_flags(data_path=data, output_dir=out, model=STUDENT, early_layers=4, head_layers=1)
    codes = as_flags(tokenizer_model=TOKENIZER, tokenizer_weight=tokenizer_path, second_input_size=32)
    codes += as_flags(codebook_size=16, codebook_dim=8)
    schedule = as_flags(batch_size=4, lr=1e-3, epochs=2, warmup_epochs=1)
    return [*flags, *codes, *schedule, *SIZE, *as_flags(num_mask_patches=2), *more]


def finetuning_flags(data: Path, out: Path, *more: str) -> list[str]:
    flags = as_flags(data_path=data, eval_data_path=data, output_dir=out, data_set="image_folder")
    model = as_flags(model="beit_demo_patch16_128", layer_decay=0.8)
    schedule = as_flags(batch_size=4, lr=1e-3, epochs=2, warmup_epochs=1)
    return [*flags, *model, *schedule, *SIZE, *more]


def segmentation_flags(data: Path, out: Path, *more: str) -> list[str]:
    flags = as_flags(data_path=data, output_dir=out, reduce_zero_label=True, nb_classes=3)
    model = as_flags(model="upernet_beit_demo_patch16", layer_decay=0.8)
    schedule = as_flags(batch_size=2, lr=1e-3, max_steps=6, steps_per_epoch=3, warmup_steps=1)
    return [*flags, *model, *schedule, *SIZE, *more]


def spoil_loss(
    monkeypatch: pytest.MonkeyPatch,
    stage: type[engine.Stage],
    factor: float = math.nan,
    steps: Container[int] = range(10**9),
) -> None:
    """Multiply the loss of these steps, counted from 0."""
    original, count = stage.step, itertools.count()

    def spoiled(self, model, batch):
        loss, logs = original(self, model, batch)
        return (loss * factor if next(count) in steps else loss), logs

    monkeypatch.setattr(stage, "step", spoiled)


def kill_after(steps, monkeypatch):
    """End the run like Ctrl-C once `steps` optimizer steps, and what follows them, are
    done.
    """
    original, taken = engine.accumulate_gradients, []

    def counted(*args):
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(1)
        return original(*args)

    monkeypatch.setattr(engine, "accumulate_gradients", counted)


def encoding_flags(weights, data, out, *more):
    fixed = as_flags(batch_size=3, num_workers=0, device="cpu")
    return [*as_flags(tokenizer_weight=weights, data_path=data, output_dir=out), *fixed, *more]


def encoded_names(out):
    return (out / "files.txt").read_text().splitlines()


class RunsCode:
    """Makes a file where an unpickler obeys what a pickle asks for."""

    def __init__(self, trace: Path | str) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


class MeanSquare(engine.Stage):
    """Of the model's output: a loss that needs no labels."""

    def step(self, model, batch):
        return model(batch["image"]).square().mean(), {}


def log_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def checkpoint(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = checkpoint(first)["model"], checkpoint(second)["model"]
    assert one.keys() == two.keys()
    different = [key for key in one if not torch.equal(one[key], two[key])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, first {different[:2]}"
