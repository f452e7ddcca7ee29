"""Which sample a rank reads when, how samples become batches, and what happens about files that did not decode.

A key (epoch, index) names a sample; the datasets derive everything random in it from
the key and the run's seed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from data_pipeline.image_formats import look_like_12_bits
from errors import UserError
from runtime.distributed import Launch, is_main, keep_freed_memory, log, log_once
from utils import derive_seed, seeded

Key = tuple[int, int]  # (epoch, index)
# an epoch mixes the images of so many shards at a time, so that these stay in the
# system's file cache
SHARDS_AT_ONCE = 16


class ResumableSampler(Sampler[list[Key]]):
    """Batches of keys (epoch, index) for one rank, a pure function of (seed, epoch, samples done).

    An epoch's global order is cut into optimizer steps of world_size * update_freq *
    batch_size samples (the incomplete last one is dropped), a step into update_freq
    micro-batches, a micro-batch into the ranks' slices. What comes after `samples_done`
    samples therefore does not depend on how many ranks or how large a batch produced
    them. With fewer samples than one step takes, `batch_size` shrinks until a single
    step covers them all (`shrunk`), and the order wraps around to give every rank the
    same number.

    `shard_sizes`: indices follow each other in files of so many images. Then the order
    of the files is shuffled, and the images of SHARDS_AT_ONCE files at a time, so that
    the reading moves through the files rather than about in all of them.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        update_freq: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        shard_sizes: Sequence[int] | None = None,
    ) -> None:
        if min(length, batch_size, update_freq, world_size) < 1:
            raise ValueError(
                f"length {length}, batch {batch_size}, update_freq {update_freq}, world "
                f"{world_size}: 1 or more"
            )
        ways = world_size * update_freq
        self.shrunk = length < batch_size * ways
        self.batch_size = -(-length // ways) if self.shrunk else batch_size
        self.length, self.update_freq, self.rank, self.world_size = length, update_freq, rank, world_size
        self.seed, self.shuffle, self.shard_sizes = seed, shuffle, shard_sizes
        self.global_batch = self.batch_size * ways  # samples of one optimizer step
        self.steps_per_epoch = max(1, length // self.global_batch)
        self.set_position(0, 0)

    def set_position(self, epoch: int, samples_done: int = 0) -> None:
        """The next iteration is this epoch's, without its first `samples_done` samples (over all ranks)."""
        self.epoch, self.samples_done = epoch, samples_done

    def order(self) -> torch.Tensor:
        """This epoch's global order of all indices, int64; when shrunk, wrapped around to one whole step."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
            order = shuffled_by_shards(self.shard_sizes or [self.length], generator)
        else:
            order = torch.arange(self.length)
        return (
            order.repeat(-(-self.global_batch // self.length))[: self.global_batch] if self.shrunk else order
        )

    def _steps_left(self) -> int:
        if self.shrunk:
            return int(self.samples_done == 0)
        return max(0, self.length - self.samples_done) // self.global_batch

    def __len__(self) -> int:
        return self._steps_left() * self.update_freq

    def __iter__(self) -> Iterator[list[Key]]:
        # Locals: a set_position for the next epoch must not bend the iteration that a
        # loader is still prefetching from.
        order, epoch, done = self.order(), self.epoch, self.samples_done
        across = self.batch_size * self.world_size  # samples of one micro-batch over all ranks
        for micro in range(len(self)):
            start = done + micro * across + self.rank * self.batch_size
            yield [(epoch, index) for index in order[start : start + self.batch_size].tolist()]


def shuffled_by_shards(sizes: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """All indices below sum(sizes), int64: the shards shuffled, and SHARDS_AT_ONCE of them
    at a time image by image. Up to so many shards it is randperm.
    """
    if len(sizes) <= SHARDS_AT_ONCE:
        return torch.randperm(sum(sizes), generator=generator)
    shards = torch.arange(sum(sizes)).split(list(sizes))
    shuffled = [shards[i] for i in torch.randperm(len(shards), generator=generator).tolist()]
    windows = [torch.cat(shuffled[i : i + SHARDS_AT_ONCE]) for i in range(0, len(shuffled), SHARDS_AT_ONCE)]
    return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])


class EvalSampler(Sampler[list[Key]]):
    """Batches of keys (0, index): every index once over all ranks. No padding: ranks may differ by one.

    `every`: only each such index.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int, every: int = 1) -> None:
        self.indices, self.batch_size = range(rank * every, length, world_size * every), batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


def build_eval_loader(
    dataset: Any,
    args: argparse.Namespace,
    launch: Launch,
    device: torch.device,
    every: int = 1,
    batch_size: int | None = None,
) -> DataLoader[dict[str, Any]]:
    """This rank's share of the data set, every image once over all ranks; `every`: only
    each such image. `batch_size`: 1 where images differ in size; default: --batch_size.
    A file that does not decode is left out, not replaced: no other image counts twice.
    """
    if isinstance(dataset, Files):
        dataset = copy.copy(dataset)
        dataset.most_failures = 1
    sampler = EvalSampler(len(dataset), batch_size or args.batch_size, launch.rank, launch.world_size, every)
    pin = args.pin_mem and device.type == "cuda"
    return build_loader(dataset, sampler, args.num_workers, pin, collate_fn=collate_readable)


def build_loader(
    dataset: Dataset[dict[str, Any]],
    batch_sampler: Sampler[list[Key]],
    num_workers: int,
    pin_memory: bool,
    persistent: bool = False,
    collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> DataLoader[dict[str, Any]]:
    """The batches of `collate` (or `collate_fn`), read by at most as many workers as this machine has cores.

    `persistent`: the workers live until `close`, over all epochs.
    """
    return Loader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=_workers(num_workers),
        pin_memory=pin_memory,
        collate_fn=collate_fn or collate,
        worker_init_fn=_start_worker,
        persistent_workers=persistent and _workers(num_workers) > 0,  # the epoch travels in the keys
        generator=torch.Generator(),  # else each epoch would move the training's own random state
    )


class Loader(DataLoader[dict[str, Any]]):
    """A loader that ends its processes when one of them brings an error. Left to the
    garbage collector (the error's frames make a cycle of it) they would lose their
    queues first, and be waited for at the interpreter's exit for ever.
    """

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        return ended_by_errors(iterator) if self.num_workers else iterator


def ended_by_errors(iterator: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from iterator
    except Exception:
        iterator._shutdown_workers()
        raise


def close(loader: DataLoader[Any]) -> None:
    """End persistent workers now: at the interpreter's exit each would be waited for in vain."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None


@functools.cache
def _workers(asked: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked > cores:
        log.info("--num_workers %d: this machine has %d cores, using %d workers", asked, cores, cores)
    return min(asked, cores)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # images come and go: 10 % of a worker's time
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):  # the main process's to handle; Windows lacks two
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # remarks about EXIF blocks and large images, once per worker
    warnings.filterwarnings("ignore", module=r"PIL\.")


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacked tensors, `failed` as one flat list; only {"failed": [...]} when some sample found no image."""
    failed = [text for sample in samples for text in sample["failed"]]
    if any("image" not in sample for sample in samples):
        return {"failed": failed}
    tensors = [{name: value for name, value in sample.items() if name != "failed"} for sample in samples]
    return {**default_collate(tensors), "failed": failed}


def collate_readable(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Of those samples alone that found their image; only {"failed": [...]} when none did."""
    failed = [text for sample in samples for text in sample["failed"]]
    return {
        **collate([sample for sample in samples if "image" in sample] or [{"failed": []}]),
        "failed": failed,
    }


class Files(Dataset[dict[str, Any]]):
    """Samples made of files. Keys are an index (epoch 0) or (epoch, index); what is random
    in a sample follows from the seed and the key.

    A file that does not decode is replaced by the next one that does (same random
    numbers). After 1 % of the files, at least 10, in a row the sample is {"failed":
    [...]} without an image. `passes`: the length is so many times the files, and an
    index means the file `index % files`.
    """

    def __init__(self, files: int, seed: int, passes: int = 1) -> None:
        self.files, self.seed, self.passes = files, seed, passes
        self.most_failures = min(files, max(10, files // 100))

    def digest(self, root: str) -> str:
        """Of what `identities` gives, less the folder `root` in front of names: the same wherever the data lies."""
        return digest(self.identities(), root)

    def identities(self) -> Iterator[bytes]:
        """What tells each file, in their order, and then the labels if there are any."""
        return (os.fsencode(self.name(place)) for place in range(self.files))

    def name(self, place: int) -> str:
        """What file `place` is called when it fails."""
        raise NotImplementedError

    def read(self, place: int) -> Any:
        """What is in file `place`; whatever is raised means that it does not decode."""
        raise NotImplementedError

    def open(self, place: int) -> Any:
        """The image of `place`, for image_formats.open_image."""
        return self.name(place)

    def warn_of_12_bits(self, looked_at: int = 16) -> None:
        """One line where some evenly spread images look like a 12-bit camera's in 16-bit files: nearly black."""
        count = min(looked_at, self.files) if is_main() else 0
        if look_like_12_bits(self.open(number * self.files // count) for number in range(count)):
            log_once(
                f"warning: images such as {self.name(0)} have 16 bits, but no value above 4095, as of "
                "a 12-bit camera: "
                "65535 is white, so they are seen nearly black; multiply their values by 16 and save "
                "them again"
            )

    def sample(self, place: int, content: Any) -> dict[str, Any]:
        """The sample made of what was read; what is raised here is no matter of decoding and ends the run."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.files * self.passes

    def __getitem__(self, key: int | Key) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        failed: list[str] = []
        for place in range(index, index + self.most_failures):
            with seeded(self.seed, epoch, index):  # anew for each file: a view may draw before it decodes
                place %= self.files
                try:
                    content = self.read(place)
                except (
                    Exception
                ) as error:  # PIL raises nearly anything for broken files, DecompressionBombError too
                    failed.append(f"{self.name(place)} ({reason(error)})")
                    continue
                return {**self.sample(place, content), "index": index, "failed": failed}
        return {"failed": failed}


def digest(names: Iterable[bytes], root: str = "") -> str:
    """Of names in their order, less the folder `root` in front of them."""
    given, absolute = (os.fsencode(os.path.join(folder, "")) for folder in (root, os.path.abspath(root)))
    found = hashlib.blake2b(digest_size=16)
    for name in names:
        found.update(name.removeprefix(given).removeprefix(absolute) + b"\0")
    return found.hexdigest()


def reason(error: Exception) -> str:
    # strerror: without the path again
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class BadFiles:
    """What is done about the files that did not decode: name each once, stop when they are too many.

    `flag` is the data folder's flag, and `instead` what is done without them, for the messages.
    """

    def __init__(
        self,
        limit_share: float = 0.01,
        at_least: int = 10,
        flag: str = "--data_path",
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

        A file is counted once an epoch: behind a bad file its neighbors' replacement may try it again.
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
                f"no image could be read, {len(unread)} files failed: "
                f"{', '.join(unread[:3])}; check {self.flag}"
            )
        count, examples = len(self.failed), ", ".join(list(self.failed)[:3])
        if count >= self.at_least and count > self.limit_share * self.reads:
            raise UserError(
                f"{count} of this epoch's {self.reads} images cannot be read ({examples}, ...): check "
                f"{self.flag}, "
                "and repair or remove these files"
            )
