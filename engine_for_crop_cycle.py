"""Pretraining on codes that are kept for K epochs later (`crop_cycle`): what the
tokenizer gave is stored, and what is stored is not computed again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint_io import checkpoints
from data_pipeline.code_cache import CodeCache, Row
from data_pipeline.crop_cycle import CropCycle
from data_pipeline.crops import PretrainingViews
from data_pipeline.files import BadFiles, Files, Key, collate
from data_pipeline.samplers import ResumableSampler, build_loader
from engine_for_pretraining import Tokens, masked_positions
from errors import ParameterError, UserError
from run_state import Run
from runtime import distributed
from runtime.device import to_device
from runtime.terminal import log

BATCHES_KEPT = 64  # their codes stay on the device, which is waited for once in so many
SECONDS_BETWEEN_LINES = 30


class CachedTokens(Tokens):
    """The codes of `tokens`, stored beside being predicted, of `crops` crops of each of
    `files`, of `patches` patches each.

    Of a batch some of whose codes are missing the whole is encoded, as it was when its
    codes were first computed; what is stored already is taken all the same, so that the
    codes of a view never change. Batches without "codes", of held-out images and
    pictures, are encoded as without a cache.
    """

    def __init__(
        self, tokens: Tokens, files: Files, views: PretrainingViews, crops: int, patches: int, run: Run
    ) -> None:
        if run.output_dir is None:
            raise ParameterError("`crop_cycle` keeps codes in the folder codes of `output_dir`: give one")
        super().__init__(tokens.tokenizer, tokens.width, run.device)
        self.channels, self.run = tokens.channels, run
        self.cache = CodeCache(run.output_dir / "codes", crops, len(files), patches, tokens.width)
        self.dataset = CropCycle(files, views, self.cache)
        self.sampler: ResumableSampler | None = None
        self.pending: list[tuple[Sequence[Row | None], Tensor]] = []

    def open(self, crop: Mapping[str, Any], sampler: ResumableSampler) -> None:
        """Make the files, or find those of an earlier run, which all ranks must see.

        `crop`: what the codes depend on beside the tokenizer, the images and the seed. The
        run knows its images.
        """
        run, crops = self.run, self.cache.crops
        if sampler.shrunk:
            raise ParameterError(
                f"`crop_cycle`: the {len(self.dataset)} images do not fill a batch, so some come twice in an "
                "epoch; take a smaller `batch_size`, or leave `crop_cycle` out"
            )
        if run.options.epochs is not None and run.options.epochs <= crops:
            log.warning(
                f"warning: no crop comes again in {run.options.epochs} epochs: the codes that `crop_cycle` "
                f"{crops} stores are of use to a longer run alone"
            )
        self.sampler = sampler
        if distributed.is_main():
            about = {"codes": self.width, "tokenizer": digest_weights(self.tokenizer), **run.data, **crop}
            about |= {"seed": run.options.seed, "precision": str(run.precision)}
            self.cache.prepare(checkpoints.to_plain_data(about))
        distributed.barrier()
        if not all(self.cache.path(number).exists() for number in range(crops)):
            raise UserError(
                f"{self.cache.folder}, in which the first process keeps the codes, is not there for process "
                f"{run.launch.rank}: `output_dir` must be one folder that all machines see"
            )

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], masked_only: bool = False) -> Tensor:
        if "codes" not in batch:
            return super().encode(batch, masked_only)
        codes = batch["codes"].flatten()
        if "rows" in batch:
            computed = super().encode(batch)
            self.pending.append((batch["rows"], computed.view_as(batch["codes"])))
            codes = torch.where(codes < 0, computed, codes)
        return masked_positions(batch).select(codes) if masked_only else codes

    def before_step(self) -> None:
        if len(self.pending) >= BATCHES_KEPT:
            self.write_pending()

    def write_pending(self) -> None:
        """What was encoded goes into the files; waits for the device."""
        if self.pending:
            all_codes = torch.cat([codes for _, codes in self.pending]).cpu().numpy()
            rows = [row for rows, _ in self.pending for row in rows]
            self.pending = []
            for row, codes in zip(rows, all_codes, strict=True):
                if row is not None:
                    self.cache.write(row, codes)

    def end_epoch(self) -> dict[str, float]:
        """Also the images that this epoch leaves out, as they do not fill a step: else
        their batches would miss them K epochs later. Then all ranks see all rows.
        """
        statistics = super().end_epoch()
        if self.sampler is not None:
            chunks = self.missing(self.sampler.left_out(), self.sampler.batch_size)
            self.store(collate(self.dataset.__getitems__(keys)) for keys in chunks)
        self.flush()
        distributed.barrier()
        return statistics

    def missing(self, keys: list[Key], length: int) -> list[list[Key]]:
        """This process's share of the keys, in batches that lack codes. Which images are
        in a batch depends neither on what is there nor on the number of processes.
        """
        self.cache.reopen()
        launch = self.run.launch
        starts = range(launch.rank * length, len(keys), launch.world_size * length)
        batches = (keys[start : start + length] for start in starts)
        return [batch for batch in batches if self.dataset.lacks(batch)]

    @torch.no_grad()
    def store(self, batches: Iterable[dict[str, Any]]) -> None:
        """Encode what is missing."""
        for batch in batches:
            if "rows" in batch:
                moved = self.dataset.device_transform(to_device(batch, self.run.device))
                with self.run.precision.autocast():
                    self.encode(moved)
            self.before_step()

    def fill(self) -> None:
        """Encode whatever is missing of all K crops, in the order of the images."""
        images, options, bad_files = len(self.dataset), self.run.options, BadFiles()
        pin, reported = options.pin_mem and self.run.device.type == "cuda", time.monotonic()
        for number in range(self.cache.crops):
            chunks = self.missing([(number, index) for index in range(images)], options.batch_size)
            bad_files.start_epoch(sum(map(len, chunks)))
            done = 0
            for batch in build_loader(self.dataset, chunks, options.num_workers, pin):  # type: ignore[arg-type]
                bad_files.add(batch["failed"], found_image="image" in batch)
                self.store([batch])
                done += len(batch["image"])
                if time.monotonic() - reported > SECONDS_BETWEEN_LINES:
                    reported = time.monotonic()
                    log.info(f"encoded    {done} of this process's images, crop {number + 1} of each")
            self.flush()
            distributed.barrier()
        log.info(f"codes      of {self.cache.crops} crops of {images:,} images are in {self.cache.folder}")

    def flush(self) -> None:
        self.write_pending()
        self.cache.flush()

    def state_dict(self) -> dict[str, Any]:
        """First the codes: those of the steps before a checkpoint are on the disk when it
        is, so that a run that goes on from it finds what it had stored.
        """
        self.flush()
        return super().state_dict()


def digest_weights(network: nn.Module) -> str:
    """Of all numbers that a frozen network computes with."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in iter_tensors(network):
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(content.numpy().data)
    return found.hexdigest()


def iter_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()
