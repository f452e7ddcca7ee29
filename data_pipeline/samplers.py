"""Which sample a rank reads when, and the loaders that read them.

A key (epoch, index) names a sample; the data sets (files.py) derive everything random
in it from the key and the run's seed.
"""

from __future__ import annotations

import copy
import functools
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from data_pipeline.files import Files, Key, SampleDataset, collate, collate_readable
from runtime.device import keep_freed_memory
from runtime.distributed import Launch
from runtime.seeding import derive_seed
from runtime.terminal import log

# an epoch mixes the images of this many shards at a time, so that these stay in the
# system's file cache
SHARDS_AT_ONCE = 16
# an image that comes again within an epoch is augmented as in an epoch this much later,
# which no run reaches
AGAIN = 10**6


def evenly_spaced(length: int, count: int) -> list[int]:
    """Up to `count` indices of `length`, as far apart as can be, always the same ones."""
    taken = min(count, length)
    return [number * length // taken for number in range(taken)]


class ResumableSampler(Sampler[list[Key]]):
    """Batches of keys (epoch, index) for one rank, a pure function of (seed, epoch,
    samples done).

    An epoch's global order is cut into optimizer steps of world_size * update_freq *
    batch_size samples (the incomplete last one is dropped), a step into update_freq
    micro-batches, a micro-batch into the ranks' slices. What comes after `samples_done`
    samples therefore does not depend on how many ranks or how large a batch produced
    them. With fewer samples than one step takes, `batch_size` shrinks until a single
    step covers them all (`shrunk`), and the order wraps around to give every rank the
    same number.

    `shard_sizes`: indices follow each other in files of this many images. Then the
    order of the files is shuffled, and the images of SHARDS_AT_ONCE files at a time, so
    that the reading moves through the files rather than about in all of them.

    `labels`, one an index: an epoch has all classes equally often (balanced_order),
    whatever lies in which file.
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
        labels: np.ndarray | None = None,
    ) -> None:
        if min(length, batch_size, update_freq, world_size) < 1:
            raise ValueError(
                f"length {length}, batch {batch_size}, update_freq {update_freq}, world {world_size}: 1 or "
                "more"
            )
        ways = world_size * update_freq
        self.shrunk = length < batch_size * ways
        self.batch_size = -(-length // ways) if self.shrunk else batch_size
        self.length, self.update_freq, self.rank, self.world_size = length, update_freq, rank, world_size
        self.seed, self.shuffle, self.shard_sizes = seed, shuffle, shard_sizes
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.global_batch = self.batch_size * ways  # samples of one optimizer step
        self.steps_per_epoch = max(1, length // self.global_batch)
        self.set_position(0, 0)

    def set_position(self, epoch: int, samples_done: int = 0) -> None:
        """The next iteration is this epoch's, without its first `samples_done` samples
        (over all ranks).
        """
        self.epoch, self.samples_done = epoch, samples_done

    def order(self) -> torch.Tensor:
        """This epoch's global order of all indices, int64; when shrunk, wrapped around
        to one whole step. With `labels`: as of balanced_order.
        """
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
            order = (
                shuffled_by_shards(self.shard_sizes or [self.length], generator)
                if self.labels is None
                else balanced_order(self.labels, generator)
            )
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
            numbers = order[start : start + self.batch_size].tolist()
            yield [(epoch + n // self.length * AGAIN, n % self.length) for n in numbers]

    def left_out(self) -> list[Key]:
        """The keys of this epoch that fill no step, in its order."""
        if self.shrunk:
            return []
        end = self.samples_done + self._steps_left() * self.global_batch
        return [(self.epoch, index) for index in self.order()[end:].tolist()]


def balanced_order(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As many indices as labels (N,), shuffled, int64: of each class equally many, but
    for a rest of one. Of a frequent class these are other images every epoch; one of a
    rare class comes again, the k-th time (from 0) as index + k N.
    """
    members = labels.argsort(stable=True).split(labels.unique(return_counts=True)[1].tolist())
    share, rest = divmod(len(labels), len(members))
    one_more = set(torch.randperm(len(members), generator=generator)[:rest].tolist())
    parts = []
    for number, indices in enumerate(members):
        quota = share + (number in one_more)
        for time in range(-(-quota // len(indices))):
            shuffled = indices[torch.randperm(len(indices), generator=generator)]
            parts.append(shuffled[: quota - time * len(indices)] + time * len(labels))
    order = torch.cat(parts)
    return order[torch.randperm(len(order), generator=generator)]


def shuffled_by_shards(sizes: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """All indices below sum(sizes), int64: the shards shuffled, and SHARDS_AT_ONCE of
    them at a time image by image. With at most that many shards it is randperm.
    """
    if len(sizes) <= SHARDS_AT_ONCE:
        return torch.randperm(sum(sizes), generator=generator)
    shards = torch.arange(sum(sizes)).split(list(sizes))
    shuffled = [shards[i] for i in torch.randperm(len(shards), generator=generator).tolist()]
    windows = [torch.cat(shuffled[i : i + SHARDS_AT_ONCE]) for i in range(0, len(shuffled), SHARDS_AT_ONCE)]
    return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])


class EvalSampler(Sampler[list[Key]]):
    """Batches of keys (0, index): every index once over all ranks. No padding: ranks
    may differ by one.

    `every`: only every n-th index.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int, every: int = 1) -> None:
        self.indices, self.batch_size = range(rank * every, length, world_size * every), batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are read: `batch_size` samples each, by `num_workers` processes (0:
    by the one that asks), with `pin_mem` into page-locked memory if they go to a GPU.
    """

    batch_size: int
    num_workers: int = 0
    pin_mem: bool = False


def build_eval_loader(
    dataset: SampleDataset, settings: LoaderSettings, launch: Launch, device: torch.device, every: int = 1
) -> Loader:
    """This rank's share of the data set, every image once over all ranks; `every`: only
    each such image. A file that does not decode is left out, not replaced: no other
    image counts twice.
    """
    if isinstance(dataset, Files):
        dataset = copy.copy(dataset)
        dataset.most_failures = 1
    sampler = EvalSampler(len(dataset), settings.batch_size, launch.rank, launch.world_size, every)
    pin = settings.pin_mem and device.type == "cuda"
    return build_loader(dataset, sampler, settings.num_workers, pin, collate_fn=collate_readable)


def build_loader(
    dataset: SampleDataset,
    batch_sampler: Sampler[list[Key]],
    num_workers: int,
    pin_memory: bool,
    persistent: bool = False,
    collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]] = collate,
) -> Loader:
    """The batches of `batch_sampler`, read by at most as many workers as this machine
    has cores.

    `persistent`: the workers live until `close`, over all epochs.
    """
    num_workers = cap_at_cores(num_workers)
    return Loader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=collate_fn,
        worker_init_fn=_start_worker,
        persistent_workers=persistent and num_workers > 0,  # the epoch travels in the keys
        generator=torch.Generator(),  # else each epoch would move the training's own random state
    )


class Loader(DataLoader[dict[str, Any]]):
    """A loader that ends its processes when one of them brings an error. Left to the
    garbage collector (the error's frames make a cycle of it) they would lose their
    queues first, and be waited for at the interpreter's exit for ever.
    """

    dataset: SampleDataset

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
    """End persistent workers now: at the interpreter's exit each would be waited for in
    vain.
    """
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None


@functools.cache
def cap_at_cores(asked: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked > cores:
        log.info("`num_workers` %d: this machine has %d cores, using %d workers", asked, cores, cores)
    return min(asked, cores)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # images come and go: 10 % of a worker's time
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):  # the main process's to handle; Windows lacks two
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # remarks about EXIF blocks and large images, once per worker
    warnings.filterwarnings("ignore", module=r"PIL\.")
