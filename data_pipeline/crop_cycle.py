"""Crops that come again after K epochs, and with them their codes (`crop_cycle`).

The crop, the flips and the colors of a view are those of (seed, epoch mod K, index), so
its codes are known from the epoch K before; the mask is that of (seed, epoch, index).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from data_pipeline.code_cache import CodeCache, Row
from data_pipeline.crops import PretrainingViews
from data_pipeline.files import Files, Key, SampleDataset
from runtime.seeding import seeded


class CropCycle(SampleDataset):
    """The images of `files` for pretraining, whose crops are repeated.

    A batch, which `__getitems__` reads, has "codes" (B, N) int64. Where all of them are
    known, there is no view for the tokenizer. Else there is one of every image, the
    codes that are missing are -1, and "row" says where they belong: the tokenizer then
    sees the whole batch, as it did when it first gave codes for it, so that they are
    the same to the bit. A single sample, as of pictures, has no codes.
    """

    def __init__(self, files: Files, views: PretrainingViews, cache: CodeCache) -> None:
        self.files, self.views, self.cache = files, views, cache
        self.shard_sizes = files.shard_sizes
        self.epoch = -1  # of the batch before

    def __len__(self) -> int:
        return len(self.files)

    def digest(self, root: str) -> str:
        return self.files.digest(root)

    def __getitem__(self, key: int | Key) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.draw((epoch, index), for_tokenizer=True)

    def __getitems__(self, keys: list[Key]) -> list[dict[str, Any]]:
        epoch = keys[0][0]
        if epoch != self.epoch:
            self.cache.reopen()
            self.epoch = epoch
        expected = not self.lacks(keys)
        samples, missing = self.read(keys, for_tokenizer=not expected)
        if expected and missing:  # another file than before does not decode
            samples, missing = self.read(keys, for_tokenizer=True)
        if not missing:
            for sample in samples:
                sample.pop("row", None)
        return samples

    def lacks(self, keys: Sequence[Key]) -> bool:
        """Whether codes of these images of one epoch are missing."""
        return self.cache.lacks(self.number(keys[0][0]), [index for _, index in keys])

    def number(self, epoch: int) -> int:
        """Of the crop, among the K of each image."""
        return epoch % self.cache.crops

    def read(self, keys: list[Key], for_tokenizer: bool) -> tuple[list[dict[str, Any]], bool]:
        """Samples with their codes, and whether any are missing."""
        samples = [self.draw(key, for_tokenizer) for key in keys]
        missing = False
        for (epoch, index), sample in zip(keys, samples, strict=True):
            if "image" in sample:
                row = Row(self.number(epoch), index, sample.pop("shown"))
                codes = self.cache.read(row)
                sample["row"] = row if codes is None else None
                sample["codes"] = (
                    torch.full(sample["mask"].shape, -1)
                    if codes is None
                    else torch.from_numpy(codes.astype("int64"))
                )
                missing |= codes is None
        return samples, missing

    def draw(self, key: Key, for_tokenizer: bool) -> dict[str, Any]:
        """A sample without codes; "shown": the index of the file that it is of."""
        epoch, index = key

        def crop(shown: int, loaded: Any) -> dict[str, Any]:
            return {**self.views.crop_image(loaded, for_tokenizer), "shown": shown}

        sample = self.files.first_readable(self.number(epoch), index, crop)
        if "image" in sample:
            with seeded(self.files.seed, "mask", epoch, index):
                sample["mask"] = self.views.draw_mask()
        return sample

    def device_transform(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = self.views.device_transform(batch)
        if "codes" in batch and "rows" not in batch:
            batch.pop("tokenizer_image", None)  # where it is the student's view
        return batch
