"""The published weights: names, addresses, hashes and results.

BEIT_MIRRORS names copies of these files, see model_zoo.py.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint_io.urls import refuse_unsafe_url
from errors import UserError

MIRRORS = ["https://github.com/addf400/files/releases/download/"]  # tried in turn
# Hosts of the published links, now closed: the same file is then looked for under
# MIRRORS.
FORMER_HOSTS = ("conversationhub.blob.core.windows.net", "unilm.blob.core.windows.net")


@dataclass(frozen=True)
class PublishedFile:
    """One published file. `file` is relative to each of MIRRORS, or a whole URL;
    `model` names the builder it fits.
    """

    file: str
    # tokenizer | pretrained | intermediate (ImageNet-21k head) | finetuned |
    # segmentation | tokenizer-v1
    kind: str
    model: str = ""
    classes: int | None = None
    sha256_prefix: str | None = None
    params: float | None = None  # millions, of the model in the file; None: not known
    metrics: Mapping[str, float] = field(default_factory=dict)  # percent; usage of the codebook is a share

    @property
    def name(self) -> str:
        return self.file.rsplit("/", 1)[-1]

    @property
    def published_urls(self) -> list[str]:
        return [self.file] if "://" in self.file else [mirror + self.file for mirror in MIRRORS]

    @property
    def urls(self) -> list[str]:
        """To be tried in turn: the user's mirrors, then what was published."""
        relative = urllib.parse.urlsplit(self.file).path.lstrip("/")
        return [
            base + file for base in get_user_mirrors() for file in (relative, self.name)
        ] + self.published_urls


def get_user_mirrors() -> list[str]:
    """The base URLs in BEIT_MIRRORS, each with a slash at its end."""
    bases = os.environ.get("BEIT_MIRRORS", "").split()
    for base in bases:
        if "://" not in base or "?" in base:
            raise UserError(
                f"BEIT_MIRRORS: {base} is not an https:// or file:// address, without a ?, to which "
                "/BEiT-v2/NAME.pth can be added"
            )
        refuse_unsafe_url(base)
    return [base.rstrip("/") + "/" for base in bases]


CLASSES = {"intermediate": 21841, "finetuned": 1000, "segmentation": 150}  # of the heads in the files


def _make_entry(
    name: str, kind: str, sha256_prefix: str | None = None, params: float | None = None, **metrics: float
) -> PublishedFile:
    """The row of a published name: its file and the builder it fits follow from the
    name.
    """
    folder = "v1.0" if name.startswith("beit_") else "BEiT-v2"
    model = name.split("_pt")[0].replace("beitv2", "beit")
    if kind == "pretrained":
        model += "_8k_vocab" if folder == "v1.0" else "_8k_vocab_cls_pt"
    file = f"{folder}/{name}-{sha256_prefix}.pth" if sha256_prefix else f"{folder}/{name}.pth"
    return PublishedFile(
        file, kind, "" if kind == "segmentation" else model, CLASSES.get(kind), sha256_prefix, params, metrics
    )


ROWS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "vqkd_encoder_base_decoder_1x768x12_clip",
        "tokenizer",
        {"params": 94.7, "sha256_prefix": "d93179da", "usage": 1.0},
    ),
    (
        "vqkd_encoder_base_decoder_3x768x12_clip",
        "tokenizer",
        {"params": 108.8, "sha256_prefix": "d5036aa7", "usage": 0.97},
    ),
    (
        "vqkd_encoder_base_decoder_1x768x12_dino",
        "tokenizer",
        {"params": 94.9, "sha256_prefix": "663c55d7", "usage": 1.0},
    ),
    ("beitv2_base_patch16_224_pt1k_300e", "pretrained", {"params": 106.1}),
    ("beitv2_base_patch16_224_pt1k", "pretrained", {"params": 106.1}),
    ("beitv2_large_patch16_224_pt1k_300e", "pretrained", {"params": 336.7}),
    ("beitv2_large_patch16_224_pt1k", "pretrained", {"params": 336.7}),
    ("beitv2_base_patch16_224_pt1k_ft21k", "intermediate", {"params": 102.6}),
    ("beitv2_large_patch16_224_pt1k_ft21k", "intermediate", {"params": 325.8}),
    ("beitv2_base_patch16_224_pt1k_300e_ft1k", "finetuned", {"params": 86.5, "top1": 85.0}),
    ("beitv2_base_patch16_224_pt1k_ft1k", "finetuned", {"params": 86.5, "top1": 85.5, "top5": 97.5}),
    (
        "beitv2_base_patch16_224_pt1k_ft21kto1k",
        "finetuned",
        {"params": 86.5, "top1": 86.458, "top5": 97.978, "loss": 0.569},
    ),
    ("beitv2_large_patch16_224_pt1k_300e_ft1k", "finetuned", {"params": 304.4, "top1": 86.6}),
    ("beitv2_large_patch16_224_pt1k_ft1k", "finetuned", {"params": 304.4, "top1": 87.3, "top5": 98.2}),
    (
        "beitv2_large_patch16_224_pt1k_ft21kto1k",
        "finetuned",
        {"params": 304.4, "top1": 88.37, "top5": 98.578, "loss": 0.493},
    ),
    ("beitv2_base_patch16_224_pt1k_ftade20k", "segmentation", {"miou": 53.1}),
    ("beitv2_base_patch16_224_pt1k_ft21ktoade20k", "segmentation", {"miou": 53.5}),
    ("beitv2_large_patch16_224_pt1k_ftade20k", "segmentation", {"miou": 56.7}),
    (
        "beitv2_large_patch16_224_pt1k_ft21ktoade20k",
        "segmentation",
        {"miou": 57.54, "macc": 68.78, "aacc": 86.22},
    ),
    ("beit_base_patch16_224_pt22k", "pretrained", {"params": 92.0}),
    ("beit_large_patch16_224_pt22k", "pretrained", {"params": 311.5}),
    ("beit_base_patch16_224_pt22k_ft22k", "intermediate", {"params": 102.6}),
    ("beit_large_patch16_224_pt22k_ft22k", "intermediate", {"params": 325.8}),
    ("beit_base_patch16_224_pt22k_ft1k", "finetuned", {"params": 86.5, "top1": 83.7}),
    ("beit_base_patch16_224_pt22k_ft22kto1k", "finetuned", {"params": 86.5, "top1": 85.2}),
    (
        "beit_base_patch16_384_pt22k_ft22kto1k",
        "finetuned",
        {"params": 86.7, "top1": 86.82, "top5": 98.124, "loss": 0.565},
    ),
    (
        "beit_large_patch16_224_pt22k_ft22kto1k",
        "finetuned",
        {"params": 304.4, "top1": 87.396, "top5": 98.282, "loss": 0.515},
    ),
    (
        "beit_large_patch16_384_pt22k_ft22kto1k",
        "finetuned",
        {"params": 305.0, "top1": 88.408, "top5": 98.602, "loss": 0.479},
    ),
    (
        "beit_large_patch16_512_pt22k_ft22kto1k",
        "finetuned",
        {"params": 305.7, "top1": 88.6, "top5": 98.658, "loss": 0.474},
    ),
]
ENTRIES = {name: _make_entry(name, kind, **facts) for name, kind, facts in ROWS}
ENTRIES["dall_e_encoder"] = PublishedFile(
    "https://cdn.openai.com/dall-e/encoder.pkl", "tokenizer-v1", params=53.8
)


def find_entry(url: str, name: str) -> PublishedFile | None:
    """The published file that `url` is an address of, present or former; `name`: the
    file's name in it.
    """
    former = urllib.parse.urlsplit(url).hostname in FORMER_HOSTS
    for entry in ENTRIES.values():
        if url.split("?")[0] in entry.published_urls or (former and entry.name == name):
            return entry
    return None
