"""What takes the place of files while an entry's `build` runs: images and weights are
read by parts of the entry that have names, and those parts are replaced here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import arguments
import modeling_dvae
import modeling_vqkd
from data_pipeline.files import SampleDataset
from engine_for_vqkd import TokenizerStage
from errors import UserError
from flags import images, pretraining, segmentation, vqkd
from flags.images import mean_and_std
from flags.pixel_format import AUTO, pixel_format
from runtime import distributed, fsdp
from segmentation.classes import ClassSettings
from segmentation.image_mask_pairs import PairView
from segmentation.mask_files import Pair

PHOTO = (500, 375)  # width, height of the image that stands for all
CLASSES, SEGMENTATION_CLASSES = 1000, 150  # ImageNet, ADE20K: where the flags do not say it
NOT_DONE: dict[str, Any] = {  # what writes, reads or takes other processes
    "output_dir": "",
    "log_dir": None,
    "resume": "",
    "auto_resume": False,
    "cooldown_from": "",
    "init_from": "",
    "freeze_epochs": 0,
    "finetune": "",
    "eval_data_path": "",
    "knn_freq": 0,
    "crop_cycle": 0,
    "health_freq": 0,
    "disable_eval": True,
    "disable_eval_during_finetuning": True,
    "teacher_weight": "random",
    "class_names": None,
    "palette": None,
    "num_workers": 0,
    "compile": False,
    "detect_anomaly": False,
    "device": "cpu",
}


class NoImages(SampleDataset):
    """As many images as are said to be there; none can be read."""

    def __init__(self, view: Any, count: int, classes: int = 0) -> None:
        self.view, self.count = view, count
        self.classes = [str(number) for number in range(classes)]
        self.labels = np.arange(count) % classes if classes else None

    def __len__(self) -> int:
        return self.count

    def digest(self, root: str) -> str:
        return ""

    def device_transform(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self.view.device_transform(batch)

    def sample(self) -> dict[str, Tensor]:
        """What the view makes of a gray photo, with a label where there are labels."""
        pixels = self.view.pixels
        photo: Any = torch.full((pixels.in_chans, *PHOTO[::-1]), 0.5)
        if pixels.is_rgb8:
            file = io.BytesIO()
            Image.new("RGB", PHOTO, (128, 128, 128)).save(file, "PNG")
            file.seek(0)
            photo = None if isinstance(self.view, PairView) else self.view.load(file)
        if isinstance(self.view, PairView):
            photo = Image.new("RGB", PHOTO) if photo is None else photo
            photo = (Pair("", ""), photo, Image.new("L", PHOTO, 1))
        label = {} if self.labels is None else {"label": torch.tensor(0)}
        return {**self.view.transform(photo), **label}


@dataclass(frozen=True)
class Entry:
    """module: with `parse_flags` and `build`.

    images: of an epoch, unless said otherwise. times_samples: whether the CPU time of a
    sample has been measured (docs/lab/data-pipeline.md). parts: of the number of images, what
    replaces functions of the module, by their names. frozen: of the stage, the networks
    that do not learn.
    """

    module: ModuleType
    images: int
    times_samples: bool
    parts: Callable[[int], dict[str, Any]]
    frozen: Callable[[Any], list[nn.Module]] = lambda stage: []

    def parse(self, words: Sequence[str]) -> arguments.Flags:
        """A command line's flags; --data_path, which is not read, may be absent."""
        if not any(word.split("=")[0] == "--data_path" for word in words):
            words = [*words, "--data_path", "nowhere"]
        args = self.module.parse_flags(words)
        for name in ("eval", "predict", "calculate_codebook_usage", "train_pixel_decoder"):
            if getattr(args, name, False):
                raise UserError(f"--{name}: only training is estimated, leave it out")
        return args

    def build(self, args: arguments.Flags, count: int) -> Any:
        """The module's own `build`, in the surroundings of pretending.pretend; `count`
        images an epoch.
        """
        if getattr(args, "fsdp", False) and distributed.world_size() > 1:  # NOT_DONE hides --compile
            ema = getattr(args, "model_ema_force_cpu", False)
            fsdp.check_options(args.opt, args.compile, ema, torch.device("cuda"))
        not_done = {name: value for name, value in NOT_DONE.items() if hasattr(args, name)}
        auto = {"image_range": [0.0, 1.0], "mean_std": ["half"]}
        auto = {name: value for name, value in auto.items() if getattr(args, name, None) == AUTO}
        with contextlib.ExitStack() as stack:
            parts = {"resolve_pixels": lambda args, *_: args} | self.parts(count)
            for name, stand_in in parts.items():
                stack.enter_context(mock.patch.object(self.module, name, stand_in))
            return self.module.build(args.replace(**not_done, **auto))


# ── The parts of each entry that read files ──


def parts_of_pretraining(count: int) -> dict[str, Any]:
    def build_tokenizer(args: argparse.Namespace, content: None) -> nn.Module:
        if pretraining.uses_dall_e(args):
            return modeling_dvae.DallEEncoder(vocab_size=args.codebook_size).eval().requires_grad_(False)
        tokenizer = modeling_vqkd.create_model(
            args.tokenizer_model,
            as_tokenizer=True,
            img_size=pretraining.student_grid(args) * modeling_vqkd.PATCH_SIZE,
            n_code=args.codebook_size,
            code_dim=args.codebook_dim,
            in_chans=pretraining.tokenizer_channels(args),
        )
        tokenizer.image_range = args.image_range  # as the file will say: no warning of another one
        return tokenizer

    return {
        "read_tokenizer_file": lambda args: None,
        "build_tokenizer": build_tokenizer,
        "build_data": lambda args: (NoImages(pretraining.build_pretraining_views(args), count), None),
    }


def parts_of_vqkd(count: int) -> dict[str, Any]:
    class Stage(TokenizerStage):
        def calibrate_targets(self) -> None:
            """Reads images."""

    return {
        "build_dataset": lambda args: NoImages(vqkd.build_tokenizer_views(args), count),
        "TokenizerStage": Stage,
    }


def parts_of_finetuning(count: int) -> dict[str, Any]:
    def build_dataset(args: argparse.Namespace, train: bool) -> tuple[NoImages, int]:
        classes, labeled = args.nb_classes or CLASSES, max(1, int(count * args.label_fraction))
        return NoImages(images.build_finetuning_view(args), labeled, classes), classes

    return {"build_dataset": build_dataset}


def parts_of_segmentation(count: int) -> dict[str, Any]:
    class NoPairs(NoImages):
        def check_that_classes_occur(self) -> None:
            """Reads masks."""

    def build_dataset(args: argparse.Namespace, train: bool, classes: Sequence[str], passes: int) -> NoPairs:
        view = segmentation.build_training_view(args)
        pairs = PairView(view, len(classes), mean_and_std(args), args.reduce_zero_label, pixel_format(args))
        return NoPairs(pairs, count * passes)

    def find_classes(settings: ClassSettings, pairs: Any) -> list[str]:
        return [str(number) for number in range(settings.nb_classes or SEGMENTATION_CLASSES)]

    return {
        "find_pairs": lambda *_, **__: [Pair("", "")] * count,
        "find_classes": find_classes,
        "build_dataset": build_dataset,
    }
