"""Who reads which sample of an epoch, and in what order."""

import pytest
import torch

from data_pipeline import samplers
from data_pipeline.image_lists import find_images
from data_pipeline.samplers import (
    EvalSampler,
    LoaderSettings,
    ResumableSampler,
    build_eval_loader,
    build_loader,
)
from datasets import ImageFiles
from errors import name_flags
from runtime.distributed import Launch
from transforms import eval_view


def test_eval_loader_reads_this_ranks_share(flat):
    dataset = ImageFiles([(path, i) for i, (path, _) in enumerate(find_images(str(flat))[0])], eval_view(32))
    settings = LoaderSettings(batch_size=4, num_workers=0, pin_mem=True)
    loaders = [build_eval_loader(dataset, settings, Launch(rank, 2), torch.device("cpu")) for rank in (0, 1)]
    labels = [[batch["label"].tolist() for batch in loader] for loader in loaders]
    assert labels == [[[0, 2, 4, 6], [8, 10]], [[1, 3, 5, 7], [9, 11]]]


def test_evaluation_pins_memory_for_a_run_on_a_gpu_alone(flat, monkeypatch):
    """By the run's device: --device cpu on a machine with a GPU pins nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dataset = ImageFiles(find_images(str(flat))[0], eval_view(32))
    for device, asked, pins in (("cpu", True, False), ("cuda", True, True), ("cuda", False, False)):
        settings = LoaderSettings(batch_size=4, num_workers=0, pin_mem=asked)
        assert build_eval_loader(dataset, settings, Launch(), torch.device(device)).pin_memory is pins


def test_workers_are_capped_at_the_cores(flat, monkeypatch):
    monkeypatch.setattr(samplers.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    said: list[str] = []
    monkeypatch.setattr(samplers.log, "info", lambda text, *args: said.append(name_flags(text % args)))
    samplers.cap_at_cores.cache_clear()
    dataset = ImageFiles(find_images(str(flat))[0], eval_view(32))
    for _ in range(2):
        assert build_loader(dataset, EvalSampler(12, 4, 0, 1), 10, True).num_workers == 3
    assert build_loader(dataset, EvalSampler(12, 4, 0, 1), 2, True).num_workers == 2
    assert said == ["--num_workers 10: this machine has 3 cores, using 3 workers"]
    samplers.cap_at_cores.cache_clear()


def global_order(length, batch, freq, world, epoch, done, seed=0):
    """What all ranks read together, micro-batch by micro-batch."""
    ranks = []
    for rank in range(world):
        sampler = ResumableSampler(length, batch, freq, rank, world, seed)
        sampler.set_position(epoch, done)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
        assert all(len(keys) == sampler.batch_size for keys in ranks[-1])
    return [key for micro in zip(*ranks, strict=True) for keys in micro for key in keys]


def test_ranks_share_an_epoch_without_repeats():
    keys = global_order(103, batch=4, freq=2, world=3, epoch=5, done=0)
    assert len(keys) == 96  # four steps of 24
    assert len(set(keys)) == 96
    assert {epoch for epoch, _ in keys} == {5}
    sampler = ResumableSampler(103, 4, 2, 0, 3, seed=0)
    assert (sampler.global_batch, sampler.steps_per_epoch, sampler.shrunk) == (24, 4, False)
    assert sorted(index for _, index in global_order(96, 4, 2, 3, 0, 0)) == list(range(96))
    assert global_order(96, 4, 2, 3, 0, 0) == global_order(96, 4, 2, 3, 0, 0)
    assert [i for _, i in global_order(96, 4, 2, 3, 0, 0)] != [i for _, i in global_order(96, 4, 2, 3, 1, 0)]
    assert global_order(96, 4, 2, 3, 0, 0) != global_order(96, 4, 2, 3, 0, 0, seed=1)


def test_the_order_goes_on_with_other_ranks_and_batch_sizes():
    whole = global_order(100, batch=2, freq=1, world=1, epoch=2, done=0)
    assert len(whole) == 100
    for batch, freq, world in [(2, 1, 1), (4, 2, 3), (5, 1, 2), (1, 4, 4)]:
        rest = global_order(100, batch, freq, world, epoch=2, done=24)
        assert rest == whole[24 : 24 + len(rest)]
        assert 0 <= 76 - len(rest) < batch * freq * world
    assert global_order(100, 2, 1, 1, 2, done=100) == []


def test_an_iteration_under_way_keeps_its_position():
    sampler = ResumableSampler(8, 2, 1, 0, 1, seed=0)
    keys = list(sampler)
    iterator = iter(sampler)
    first = next(iterator)
    sampler.set_position(1, 4)
    assert [first, *iterator] == keys


def test_unshuffled_order():
    sampler = ResumableSampler(6, 2, 1, 0, 1, seed=0, shuffle=False)
    assert list(sampler) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4), (0, 5)]]


@pytest.mark.parametrize("length", [1, 3, 7, 23])
def test_tiny_data_sets_give_one_step_of_every_image(length):
    sampler = ResumableSampler(length, 4, 2, 0, 3, seed=0)
    assert sampler.shrunk
    assert sampler.steps_per_epoch == 1
    assert sampler.batch_size == -(-length // 6)
    keys = global_order(length, 4, 2, 3, epoch=1, done=0)
    assert len(keys) == sampler.global_batch == 6 * sampler.batch_size
    assert {index for _, index in keys} == set(range(length))
    sampler.set_position(1, sampler.global_batch)
    assert list(sampler) == []


def test_a_whole_number_of_steps_is_not_shrunk():
    assert not ResumableSampler(24, 4, 2, 0, 3, seed=0).shrunk
    assert ResumableSampler(24, 4, 2, 0, 3, seed=0).steps_per_epoch == 1


@pytest.mark.parametrize(
    ("length", "batch", "world"), [(10, 3, 1), (10, 3, 4), (3, 2, 4), (16, 4, 2), (17, 4, 2)]
)
def test_evaluation_reads_everything_once(length, batch, world):
    samplers = [EvalSampler(length, batch, rank, world) for rank in range(world)]
    batches = [keys for sampler in samplers for keys in sampler]
    assert [len(list(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers]
    assert sorted(key for keys in batches for key in keys) == [(0, index) for index in range(length)]
    assert all(1 <= len(keys) <= batch for keys in batches)
