"""Samples made of files: what becomes of one that does not decode, and of a batch of
them.

The way of an image, from its path in a list to the tensor that the network takes:

1. `Files.__getitem__`, here: the sampler's key (epoch, index) seeds all that is random;
2. `ImageFiles.open` in datasets.py: the path behind the index, or the bytes in a shard;
3. `View.load` in data_pipeline/crops.py: decodes it;
4. `View.transform`, there: the random crop, resized, as uint8 tensors;
5. `ImageFiles.sample` in datasets.py: adds the label;
6. `collate`, here: a batch, which the loader hands to the training process;
7. `to_device` in runtime/device.py, called by the training loop;
8. `View.device_transform` in data_pipeline/crops.py: floats, normalized.

Steps 1 to 6 run in a process of the loader. A file that does not decode fails in step 3
and is replaced by the next one.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from data_pipeline.image_formats import look_like_12_bits
from data_pipeline.pixel_format import PixelFormat
from errors import UserError
from layers.token_subset import list_masked
from runtime.distributed import is_main
from runtime.seeding import seeded
from runtime.terminal import log, log_once

Key = tuple[int, int]  # (epoch, index)


class View(Protocol):
    """What a network is shown of a file, in three steps (see the module).

    Random views draw from the global generators of Python, NumPy and torch, which the
    data set seeds for each sample.
    """

    pixels: PixelFormat  # how files are read

    def load(self, source: Any) -> Any:
        """Decode what `Files.open` gives; whatever this raises means that the file does
        not decode.
        """

    def transform(self, loaded: Any) -> dict[str, Tensor]:
        """A sample as it travels to the device. What this raises ends the run."""

    def device_transform(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of samples, on any device, as the network takes it."""


class SampleDataset(Dataset[dict[str, Any]]):
    """What the training loop asks of a data set. A key is an index (epoch 0) or (epoch,
    index); what is random in a sample follows from the seed and the key.
    """

    shard_sizes: Sequence[int] | None = None  # where neighbors lie in one file: images of each file

    def __len__(self) -> int:
        raise NotImplementedError

    def digest(self, root: str) -> str:
        """A digest of what the data set consists of, which does not depend on the
        folder `root` in which it lies: a resumed run must find the same one.
        """
        raise NotImplementedError

    def device_transform(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of samples, on any device, as the network takes it."""
        return batch


class Files(SampleDataset):
    """Samples that a view makes of files.

    A file that does not decode is replaced by the next one that does, with the same
    random numbers. After 1 % of the files in a row, at least 10, the sample is
    {"failed": [...]} without an image. `passes`: the length is that many times the
    number of files, and an index means the file `index % files`.
    """

    def __init__(self, files: int, view: View, seed: int, passes: int = 1) -> None:
        self.files, self.view, self.seed, self.passes = files, view, seed, passes
        self.most_failures = min(files, max(10, files // 100))

    def digest(self, root: str) -> str:
        return digest(self.identities(), root)

    def identities(self) -> Iterator[bytes]:
        """What tells each file, in their order, and then the labels if there are
        any.
        """
        return (os.fsencode(self.name(index)) for index in range(self.files))

    def name(self, index: int) -> str:
        """What messages call the file."""
        raise NotImplementedError

    def open(self, index: int) -> Any:
        """The file as the view loads it."""
        raise NotImplementedError

    def sample(self, index: int, loaded: Any) -> dict[str, Any]:
        return self.view.transform(loaded)

    def device_transform(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self.view.device_transform(batch)

    def __len__(self) -> int:
        return self.files * self.passes

    def __getitem__(self, key: int | Key) -> dict[str, Any]:
        epoch, first = key if isinstance(key, tuple) else (0, key)
        return self.first_readable(epoch, first, self.sample)

    def first_readable(
        self, epoch: int, first: int, sample: Callable[[int, Any], dict[str, Any]]
    ) -> dict[str, Any]:
        """What `sample` makes of the first file from `first` on that decodes: of its
        index and what was loaded, with the random numbers of (seed, epoch, first).
        """
        failed: list[str] = []
        for index in range(first, first + self.most_failures):
            index %= self.files
            with seeded(self.seed, epoch, first):  # again for each file: a view may draw before it decodes
                try:
                    loaded = self.view.load(self.open(index))
                except Exception as error:  # PIL raises nearly anything for broken files
                    failed.append(f"{self.name(index)} ({reason_of(error)})")
                    continue
                return {**sample(index, loaded), "index": first, "failed": failed}
        return {"failed": failed}

    def warn_of_12_bits(self, open_image: Callable[[int], Any], looked_at: int = 16) -> None:
        """One line where some evenly spread images look like a 12-bit camera's in
        16-bit files: they are nearly black. `open_image`: index -> what image_formats
        opens.
        """
        count = min(looked_at, self.files) if is_main() and self.view.pixels.is_rgb8 else 0
        if look_like_12_bits(open_image(number * self.files // count) for number in range(count)):
            log_once(
                f"warning: images such as {self.name(0)} have 16 bits, but no value above 4095, as of a "
                "12-bit camera: 65535 is white, so they are seen nearly black; give `image_range` 0 4095"
            )


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacked tensors, `failed` as one flat list; only {"failed": [...]} when some
    sample found no image. Beside masks (B, N) "masked": where they are (list_masked),
    so that only this travels to the device. Of what each has as "row" the list "rows",
    which stays on the host.
    """
    failed = [text for sample in samples for text in sample["failed"]]
    if any("image" not in sample for sample in samples):
        return {"failed": failed}
    rows = {"rows": [sample["row"] for sample in samples]} if "row" in samples[0] else {}
    on_host = ("failed", "row")
    tensors = [{name: value for name, value in sample.items() if name not in on_host} for sample in samples]
    batch = default_collate(tensors) | rows
    positions = {"masked": list_masked(batch["mask"])} if "mask" in batch else {}
    return {**batch, **positions, "failed": failed}


def collate_readable(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Of those samples alone that found their image; only {"failed": [...]} when none
    did.
    """
    failed = [text for sample in samples for text in sample["failed"]]
    return {
        **collate([sample for sample in samples if "image" in sample] or [{"failed": []}]),
        "failed": failed,
    }


def digest(names: Iterable[bytes], root: str = "") -> str:
    """Of names in their order, less the folder `root` in front of them."""
    given, absolute = (os.fsencode(os.path.join(folder, "")) for folder in (root, os.path.abspath(root)))
    found = hashlib.blake2b(digest_size=16)
    for name in names:
        found.update(name.removeprefix(given).removeprefix(absolute) + b"\0")
    return found.hexdigest()


def reason_of(error: Exception) -> str:
    # strerror: without the path again
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class BadFiles:
    """What is done about the files that did not decode: name each once, stop when they
    are too many.

    `flag` is the data folder's flag, and `instead` what is done without them, for the
    messages.
    """

    def __init__(
        self,
        limit_share: float = 0.01,
        at_least: int = 10,
        flag: str = "`data_path`",
        instead: str = "using the next image",
    ) -> None:
        self.limit_share, self.at_least, self.flag, self.instead = limit_share, at_least, flag, instead
        self.named: set[str] = set()
        self.start_epoch(0)

    def start_epoch(self, reads: int) -> None:
        """`reads`: how many samples this process reads in the epoch."""
        self.reads, self.failed = reads, dict[str, None]()

    def add(self, failed: list[str], found_image: bool = True) -> None:
        """A batch's `failed`, and whether the batch has an `image`; UserError when the
        data cannot be trained on.

        A file is counted once an epoch: after a bad file its neighbors' replacement
        may try it again.
        """
        self.failed.update(dict.fromkeys(failed))
        for text in dict.fromkeys(failed):
            # ranks other than the first show errors only, and each meets other files
            if text not in self.named:
                log.log(
                    logging.WARNING if is_main() else logging.ERROR, "cannot read %s: %s", text, self.instead
                )
        self.named.update(failed)
        if not found_image:
            unread = list(dict.fromkeys(failed))
            raise UserError(
                f"no image could be read, {len(unread)} files failed: {', '.join(unread[:3])}; check "
                f"{self.flag}"
            )
        count, examples = len(self.failed), ", ".join(list(self.failed)[:3])
        if count >= self.at_least and count > self.limit_share * self.reads:
            raise UserError(
                f"{count} of this epoch's {self.reads} images cannot be read ({examples}, ...): check "
                f"{self.flag}, and repair or remove these files"
            )
