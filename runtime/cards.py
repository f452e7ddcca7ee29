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
    """memory: in bytes, as CUDA says them: less than the name, by what the driver and ECC
    keep. capability: of CUDA, major x 10 + minor. tflops: dense peak in fp16 and bf16, sums
    in fp32. tflops_fp32: without TF32. mfu, mfu_fp32: the share of it that a step is assumed
    to reach, which has not been measured.

    Peaks: NVIDIA's data sheets of V100 (SXM2), T4, A10, L40S, A100, H100 and H200 (SXM),
    without sparsity, and its GA102 and Ada white papers for the RTX cards. Memory: the
    "total capacity" of torch's out-of-memory messages in public issues, rounded down.
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


def gib(number: float) -> int:
    return int(number * GIB)


CARDS = {
    card.name: card
    for card in (
        Card("V100-16GB", gib(15.7), 70, 125, 15.7, mfu=0.30),
        Card("V100-32GB", gib(31.7), 70, 125, 15.7, mfu=0.30),
        Card("T4-16GB", gib(14.5), 75, 65, 8.1, mfu=0.30),
        Card("A10-24GB", gib(21.9), 86, 125, 31.2, mfu=0.40),
        Card("RTX3090-24GB", gib(23.6), 86, 71, 35.6, mfu=0.40),
        Card("RTX4090-24GB", gib(23.6), 89, 165, 82.6, mfu=0.40),
        Card("L40S-48GB", gib(44.4), 89, 362, 91.6, mfu=0.35),
        Card("A100-40GB", gib(39.3), 80, 312, 19.5, mfu=0.40),
        Card("A100-80GB", gib(79.1), 80, 312, 19.5, mfu=0.40),
        Card("H100-80GB", gib(79.1), 90, 989, 67, mfu=0.35),
        Card("H200-141GB", gib(139), 90, 989, 67, mfu=0.35),
    )
}


def find_card(name: str) -> Card:
    return pick(CARDS, name, "`gpu`")


def recognize(device_name: str, memory: int) -> Card | None:
    """The row of what CUDA calls a GPU (`NVIDIA A100-SXM4-80GB`), of the rows that
    differ in memory the nearest; None where there is none.
    """
    words = re.split(r"[\s-]", re.sub(r"RTX (\d+)$", r"RTX\1", device_name))
    alike = [card for card in CARDS.values() if card.name.split("-")[0] in words]
    return min(alike, key=lambda card: abs(card.memory - memory), default=None)


def has_peak_of_its_row(device_name: str) -> bool:
    """Not slower products of the same name: on PCIe (A100s apart, which are as fast
    there), in pairs, parts of a card.
    """
    words = set(re.split(r"[\s-]", device_name.lower()))
    return not words & {"nvl", "mig"} and ("pcie" not in words or "a100" in words)
