"""Training on shards: the order of an epoch, ranks and workers, exact resumption."""

import numpy as np
import pytest
import torch
from tiny_channels import four_channels
from tiny_data import data_args, shard_pattern
from tiny_runs import (
    as_flags,
    assert_same_weights,
    checkpoint,
    finetuning_flags,
    kill_after,
    log_lines,
    pretraining_flags,
    tokenizer,
    vqkd_flags,
)

import datasets
import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
from data_pipeline.image_formats import load_image
from data_pipeline.samplers import SHARDS_AT_ONCE, ResumableSampler, build_loader, shuffled_by_shards
from run_vqkd_training import build_dataset as build_vqkd_dataset


def test_the_order_mixes_few_shards_and_follows_seed_and_epoch():
    sizes = [7] * 41
    owner = torch.repeat_interleave(torch.arange(41), torch.tensor(sizes))
    sampler = ResumableSampler(sum(sizes), 4, 1, 0, 1, seed=3, shard_sizes=sizes)
    sampler.set_position(5)
    order = sampler.order()
    assert order.sort().values.tolist() == list(range(287))
    assert torch.equal(order, sampler.order())
    window = SHARDS_AT_ONCE * 7
    assert len(owner[order[:window]].unique()) == SHARDS_AT_ONCE
    assert len(owner[order[:32]].unique()) > 10  # mixed within
    sampler.set_position(6)
    assert not torch.equal(order, sampler.order())
    few = [torch.randperm(80, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(1)]
    assert torch.equal(shuffled_by_shards([5] * 16, few[1]), few[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_shared_without_repeats_and_resumed(workers, packed, monkeypatch):
    monkeypatch.setattr("data_pipeline.samplers.SHARDS_AT_ONCE", 2)
    dataset = build_vqkd_dataset(data_args(packed, data_set="webdataset"))
    assert dataset.shard_sizes == [5, 5, 5, 5, 4]

    def read(done):
        parts = []
        for rank in range(2):
            sampler = ResumableSampler(len(dataset), 3, 2, rank, 2, seed=0, shard_sizes=dataset.shard_sizes)
            sampler.set_position(1, done)
            parts.append(list(build_loader(dataset, sampler, workers, pin_memory=False)))
        return parts

    whole, rest = read(0), read(12)
    indices = [i for part in whole for batch in part for i in batch["index"].tolist()]
    assert len(indices) == len(set(indices)) == 24
    for part, after in zip(whole, rest, strict=True):
        for batch, same in zip(part[2:], after, strict=True):
            assert torch.equal(batch["image"], same["image"])
    images = {int(batch["index"][0]): batch["image"][0] for batch in whole[0]}
    for index, image in images.items():
        assert torch.equal(dataset[1, index]["image"], image)


def test_a_sample_depends_on_seed_epoch_and_index_as_in_a_folder(packed):
    dataset = build_vqkd_dataset(data_args(packed, data_set="webdataset"))
    pixels = np.asarray(load_image(dataset.source(7).read()))
    in_memory = datasets.ImageFiles([(pixels, None)] * 8, dataset.view)
    assert torch.equal(in_memory[2, 7]["image"], dataset[2, 7]["image"])


SHARDS = ["--data_set", "webdataset", "--num_workers", "2"]


@pytest.mark.slow
def test_pretraining_on_shards_resumes_bit_for_bit(packed, tmp_path):
    codes = tokenizer(tmp_path / "tokenizer.pth")
    more = [
        *SHARDS,
        *as_flags(eval_data_path=packed, drop_path=0.1, save_ckpt_steps=4, keep_ckpts=9),
    ]
    run_beitv2_pretraining.main(pretraining_flags(shard_pattern(packed), tmp_path / "whole", codes, *more))
    middle = tmp_path / "whole" / "checkpoint-step8.pth"
    assert checkpoint(middle)["next"] == {"epoch": 1, "samples": 8, "step": 8, "images": 32}
    resumed = [
        *pretraining_flags(shard_pattern(packed), tmp_path / "resumed", codes, *more),
        "--resume",
        str(middle),
    ]
    run_beitv2_pretraining.main(resumed)
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "resumed/checkpoint.pth")
    assert log_lines(tmp_path / "whole")[1]["train_loss"] == log_lines(tmp_path / "resumed")[0]["train_loss"]
    assert "test_loss" in log_lines(tmp_path / "whole")[1]


@pytest.mark.slow
def test_the_other_stages_train_on_shards(packed, tmp_path):
    run_vqkd_training.main(
        vqkd_flags(shard_pattern(packed), tmp_path / "vqkd", *SHARDS, "--eval_data_path", str(packed))
    )
    assert "test_rec_loss" in log_lines(tmp_path / "vqkd")[1]
    flags = [*finetuning_flags(packed, tmp_path / "ft"), *SHARDS]
    run_class_finetuning.main(flags)
    assert log_lines(tmp_path / "ft")[-1]["test_images"] == 24
    assert checkpoint(tmp_path / "ft/checkpoint.pth")["stage"]["classes"] == ["a", "b"]


def test_arrays_in_shards_resume_as_exactly_as_in_a_folder(make_shards, tmp_path, monkeypatch, capsys):
    folder, out = four_channels(tmp_path / "scenes"), tmp_path / "packed"
    make_shards([str(folder), str(out), "--images_per_shard", "5"])
    auto = as_flags(in_chans=4, image_range="auto", mean_std="auto", save_ckpt_steps=1)
    pixels = as_flags(target="pixels")
    shards = [*auto, *pixels, *SHARDS]
    run_beitv2_pretraining.main(pretraining_flags(folder, tmp_path / "folder", "", *auto, *pixels))
    run_beitv2_pretraining.main(pretraining_flags(out, tmp_path / "whole", "", *shards))
    with monkeypatch.context() as patched:
        kill_after(3, patched)
        with pytest.raises(KeyboardInterrupt):
            run_beitv2_pretraining.main(pretraining_flags(out, tmp_path / "cut", "", *shards))
    run_beitv2_pretraining.main(pretraining_flags(out, tmp_path / "cut", "", *shards))
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "cut/checkpoint.pth")
    kept = [
        {
            name: checkpoint(tmp_path / run / "checkpoint.pth")["args"][name]
            for name in ("image_range", "mean_std")
        }
        for run in ("folder", "whole", "cut")
    ]
    assert kept[0] == kept[1] == kept[2] and len(kept[0]["mean_std"]) == 8
