"""What is measured and how a user sees it: running means that stay on the device,
accuracy, progress, log.txt, TensorBoard.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image
from tqdm import tqdm

from runtime import distributed
from runtime.terminal import log

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class RunningMeans:
    """Means of scalar tensors by name; adding them never reads them back, so it never
    synchronizes the device.

    The names must be the same at every `add`. Values that are not finite are left out
    of their mean.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # (2, names): sums and counts

    def add(self, values: dict[str, Tensor], weight: float = 1.0) -> None:
        """`weight`: how many images (or patches) the values are the mean of, where
        batches differ in size.
        """
        row = torch.stack([value.detach().float() for value in values.values()])
        fine = torch.isfinite(row)
        new = weight * torch.stack((torch.where(fine, row, 0.0), fine.float())).double()
        if self.sums is None:
            self.names, self.sums = list(values), new
        else:
            self.sums += new

    def compute(self, over_all_ranks: bool = False) -> dict[str, float]:
        """Name -> mean, with one synchronization for all of them. A rank that added
        nothing takes part all the same.
        """
        names, sums = self.names, torch.zeros(0) if self.sums is None else self.sums.clone()
        if over_all_ranks and distributed.world_size() > 1:
            # Through the host: a rank without a batch knows neither the names nor the
            # device.
            everyone = distributed.gather_objects((names, sums.tolist()))
            names = next((theirs for theirs, _ in everyone if theirs), [])
            sums = sum(
                (torch.tensor(theirs, dtype=torch.float64) for has, theirs in everyone if has),
                torch.zeros(2, len(names)),
            )
        if not names:
            return {}
        totals, counts = sums.tolist()
        return {name: t / c if c else float("nan") for name, t, c in zip(names, totals, counts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "sums": None if self.sums is None else self.sums.cpu()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.names = list(state["names"])
        self.sums = None if state["sums"] is None else state["sums"].to(device)


def top_k_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many of labels (B,) are among the k highest logits (B, classes): a scalar
    tensor.
    """
    k = min(k, logits.shape[1])
    return (logits.topk(k, dim=1).indices == labels[:, None]).sum()


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of rows whose highest logit is the target; targets are indices (M,) or
    probabilities (M, classes).
    """
    if targets.ndim == 2:
        targets = targets.argmax(dim=1)
    return (logits.argmax(dim=1) == targets).float().mean()


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images (B, 3, height, width) in [0,
    1]: (B,), in dB; equal ones have 100.
    """
    error = (images.float() - others.float()).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


@dataclass(frozen=True)
class RunCounts:
    """How long a run is, and where in it this process starts or goes on."""

    epochs: int  # of the whole run
    first_epoch: int
    first_step: int  # optimizer steps that earlier parts of the run took
    images_per_step: int  # of all ranks together


class Reporter:
    """Progress on the terminal, log.txt, TensorBoard and pictures. Rank 0 reports; the
    others only time their loaders.

    Args:
        output_dir: of log.txt and pictures; empty: there are none.
        log_dir: of TensorBoard's files, if not output_dir.
    """

    def __init__(self, output_dir: str, log_dir: str | None, device: torch.device, counts: RunCounts) -> None:
        self.device, self.epochs, self.images_per_step = device, counts.epochs, counts.images_per_step
        main, folder = distributed.is_main(), log_dir or output_dir
        self.output_dir = Path(output_dir) if main and output_dir else None
        self.writer = SummaryWriter(folder, purge_step=counts.first_step or None) if main and folder else None
        self.bar = tqdm(disable=not (main and sys.stderr.isatty()), leave=False, dynamic_ncols=True)
        if self.output_dir is not None:
            path = self.output_dir / "log.txt"
            if counts.first_step > 0:
                forget_epochs_from(counts.first_epoch, path)
            elif path.exists():  # another run's
                path.replace(path.with_name(f"log-until-{time.strftime('%Y%m%d-%H%M%S')}.txt"))

    @property
    def shows_pictures(self) -> bool:
        return self.writer is not None or self.output_dir is not None

    def start_epoch(self, epoch: int, done: int, steps_per_epoch: int, step: int) -> None:
        """done: steps of this epoch that were taken before. step: those of the whole
        run.
        """
        self.title, self.steps_per_epoch = f"epoch {epoch + 1}/{self.epochs}", steps_per_epoch
        self.steps_before_epoch = step - done
        self.bar.reset(steps_per_epoch)
        self.bar.set_description(self.title)
        self.epoch_started = self.last_report = time.monotonic()
        self.last_step, self.waited = step, 0.0

    def waiting_for(self, batches: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """The next `count` micro-batches; the time they take is the data-wait share."""
        asked = time.monotonic()
        group = [next(batches) for _ in range(count)]
        self.waited += time.monotonic() - asked
        return group

    def step(self, means: dict[str, float], lr: float, step: int, steps_left: int) -> None:
        """One progress report: the epoch's means so far, and the speed since the last
        report.
        """
        seconds, steps = max(time.monotonic() - self.last_report, 1e-9), max(step - self.last_step, 1)
        speed = steps * self.images_per_step / seconds
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        text += (
            f"  lr {lr:.2e}  {speed:.{0 if speed >= 10 else 2}f} images/s  data wait "
            f"{100 * self.waited / seconds:.0f}%"
        )
        text += f"  {memory(self.device)}  eta {clock(steps_left * seconds / steps)}"
        step_in_epoch = step - self.steps_before_epoch
        if self.bar.disable:
            log.info(f"{self.title} [{step_in_epoch}/{self.steps_per_epoch}]  {text}")
        else:
            self.bar.n = step_in_epoch
            self.bar.set_postfix_str(text)
        if self.writer is not None:
            scalars = {f"train/{name}": value for name, value in means.items()}
            for name, value in (scalars | {"train/lr": lr, "speed/images_per_second": speed}).items():
                self.writer.add_scalar(name, value, step)
        self.last_report, self.last_step, self.waited = time.monotonic(), step, 0.0

    def epoch(self, epoch: int, train: dict[str, float], test: dict[str, float]) -> None:
        """One JSON object in log.txt, one line on the terminal."""
        seconds = round(time.monotonic() - self.epoch_started, 2)
        line = {
            "epoch": epoch,
            **{f"train_{name}": value for name, value in train.items()},
            **test,
            "seconds": seconds,
        }
        text = "  ".join(f"{name} {value:.4g}" for name, value in line.items() if name != "epoch")
        log.info(f"{self.title} done  {text}")
        if self.output_dir is not None:
            with open(self.output_dir / "log.txt", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.writer is not None:
            for name, value in line.items():
                self.writer.add_scalar(f"epoch/{name}", value, epoch)
            self.writer.flush()

    def pictures(self, epoch: int, images: dict[str, Tensor]) -> None:
        """Images (3, height, width) in [0, 1], by name."""
        for name, image in images.items():
            if self.writer is not None:
                self.writer.add_image(name, image, epoch)
            if self.output_dir is not None:
                folder = self.output_dir / "pictures"
                folder.mkdir(exist_ok=True)
                save_image(image, folder / f"{name}-{epoch:04d}.png")

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def forget_epochs_from(epoch: int, path: Path) -> None:
    """A resumed run rewrites the lines of the epochs it repeats."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and epoch_of(line) < epoch]
        shorter = path.with_name(f".{path.name}.part")  # a full disk must not cost the old lines
        shorter.write_text("".join(kept), encoding="utf-8")
        shorter.replace(path)


def epoch_of(line: str) -> int:
    """-1 for a line that is none of ours: it is left as it is."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{seconds:02d}"


def memory(device: torch.device) -> str:
    """Peak memory of this process, on its GPU or in main memory."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB GPU"
    if resource is None:
        return "? GiB"
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
