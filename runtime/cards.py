"""GPUs: memory and peak of each, as the data sheets say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from errors import pick

GIB = 2**30
# beside what a step allocates: the share lost between blocks of the allocator; CUDA's
# context, cuBLAS's workspaces and NCCL's buffers, in bytes
FRAGMENTS, CONTEXT = 0.05, GIB


@dataclass(frozen=True)
class Card:
    """memory: in bytes. capability: of CUDA, major x 10 + minor. tflops: dense peak of
    the data sheet in fp16 and bf16, tflops_fp32: in fp32 without TF32. mfu, mfu_fp32: the
    share of it that a step is assumed to reach, which has not been measured.
    """

    name: str
    memory: int
    capability: int
    tflops: float
    tflops_fp32: float
    mfu: float
    mfu_fp32: float = 0.6

    @property
    def dtype(self) -> str:
        """What `amp_dtype` auto chooses there (runtime.device.choose_precision)."""
        return "bf16" if self.capability >= 80 else "fp16"

    def has_matrix_units(self, dtype: str) -> bool:
        return dtype == "fp16" or (dtype == "bf16" and self.capability >= 80)

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s in `amp_dtype`."""
        return 1e12 * (self.tflops if self.has_matrix_units(dtype) else self.tflops_fp32)

    def assumed_mfu(self, dtype: str) -> float:
        return self.mfu if self.has_matrix_units(dtype) else self.mfu_fp32

    def holds(self, peak: int) -> bool:
        return needed(peak) <= self.memory


def needed(peak: int) -> int:
    """Bytes that a card must have for a step that allocates `peak`."""
    return int(peak * (1 + FRAGMENTS)) + CONTEXT


CARDS = {
    card.name: card
    for card in (
        Card("V100-16GB", 16 * GIB, 70, 125, 15.7, mfu=0.30),
        Card("V100-32GB", 32 * GIB, 70, 125, 15.7, mfu=0.30),
        Card("T4-16GB", 15 * GIB, 75, 65, 8.1, mfu=0.30),
        Card("A10-24GB", 22 * GIB, 86, 125, 31.2, mfu=0.40),
        Card("RTX3090-24GB", 24 * GIB, 86, 71, 35.6, mfu=0.40),
        Card("RTX4090-24GB", 24 * GIB, 89, 165, 82.6, mfu=0.40),
        Card("L40S-48GB", 45 * GIB, 89, 362, 91.6, mfu=0.35),
        Card("A100-40GB", 39 * GIB, 80, 312, 19.5, mfu=0.40),
        Card("A100-80GB", 79 * GIB, 80, 312, 19.5, mfu=0.40),
        Card("H100-80GB", 79 * GIB, 90, 989, 67, mfu=0.35),
        Card("H200-141GB", 139 * GIB, 90, 989, 67, mfu=0.35),
    )
}


def find_card(name: str) -> Card:
    return pick(CARDS, name, "`gpu`")


def recognize(device_name: str, memory: int) -> Card | None:
    """The row of what CUDA calls a GPU (`NVIDIA A100-SXM4-80GB`), of the rows that
    differ in memory the nearest; None where there is none.
    """
    words = re.split(r"[\s-]", device_name.replace("RTX ", "RTX"))
    alike = [card for card in CARDS.values() if card.name.split("-")[0] in words]
    return min(alike, key=lambda card: abs(card.memory - memory), default=None)


def has_peak_of_its_row(device_name: str) -> bool:
    """Not slower or faster products of the same name: on PCIe (A100s apart, which are as
    fast there), pairs of cards, parts of a card, other chips.
    """
    words = {word.lower() for word in re.split(r"[\s-]", device_name)}
    return not words & {"nvl", "mig", "ti", "super", "laptop", "d", "mobile"} and (
        "pcie" not in words or "a100" in words
    )
