"""--augment_on_device: the device augments as a worker does."""

import pytest
import torch
from tiny_runs import (
    as_flags,
    assert_same_weights,
    log_lines,
    photos,
    pretraining_flags,
    tokenizer,
    vqkd_flags,
)
from tiny_views import files_of_many_kinds, pretraining, scene

import run_beitv2_pretraining
import run_vqkd_training
from data_pipeline.samplers import ResumableSampler, build_loader
from datasets import ImageFiles
from runtime.device import to_device


@pytest.mark.slow
@pytest.mark.parametrize("jitter", [0.0, 0.4])
@pytest.mark.parametrize("second", [None, 64, 32])
def test_the_device_augments_as_a_worker_does(tmp_path, jitter, second):
    samples = [(file, None) for file in files_of_many_kinds(tmp_path).values()]
    batches = []
    for on_device in (False, True):
        views = pretraining(64, second, jitter=jitter, vflip=0.5, pipeline="fast", on_device=on_device)
        dataset = ImageFiles(samples, views, seed=2)
        batch = next(
            iter(build_loader(dataset, ResumableSampler(10, 10, 1, 0, 1, seed=0), 0, pin_memory=False))
        )
        assert batch["image"].dtype == torch.uint8
        assert ("params" in batch) == on_device
        assert ("tokenizer_image" in batch) == (second == 32)  # equal views travel once
        batches.append(dataset.device_transform(to_device(batch, torch.device("cpu"))))
    assert batches[0].keys() == batches[1].keys()
    for name in {"image", "tokenizer_image"} & batches[0].keys():
        assert batches[0][name].dtype == torch.float32
        assert torch.equal(batches[0][name], batches[1][name])
    assert torch.equal(batches[0]["mask"], batches[1]["mask"])
    raw = [
        ImageFiles(samples, pretraining(pipeline="fast", jitter=jitter, vflip=0.5, on_device=True), seed=2)[
            0, 0
        ]
    ]
    # something was left to do
    assert not torch.equal(raw[0]["image"].float() / 255 * 2 - 1, batches[0]["image"][0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_the_pixels_that_the_cpu_gets(tmp_path):
    samples = [(file, None) for file in files_of_many_kinds(tmp_path).values()]
    for pipeline, on_device in (("exact", False), ("fast", True)):
        dataset = ImageFiles(samples, pretraining(64, 32, vflip=0.5, pipeline=pipeline, on_device=on_device))
        batch = next(
            iter(build_loader(dataset, ResumableSampler(10, 10, 1, 0, 1, seed=0), 0, pin_memory=True))
        )
        here = dataset.device_transform(to_device(batch, torch.device("cpu")))
        there = dataset.device_transform(to_device(batch, torch.device("cuda", 0)))
        assert there["mask"].device.type == "cpu"
        for name in ("image", "tokenizer_image"):
            assert torch.equal(here[name], there[name].cpu())


def test_a_quarter_of_the_bytes_travel():
    sample = pretraining(64, 64).transform(scene())
    assert sum(value.nbytes for name, value in sample.items() if name != "mask") == 3 * 64 * 64


@pytest.mark.slow
def test_runs_do_not_depend_on_who_augments(tmp_path):
    data, codes = photos(tmp_path / "photos"), tokenizer(tmp_path / "tokenizer.pth")
    for name, more in {"worker": [], "device": ["--augment_on_device"]}.items():
        flags = [
            *as_flags(data_pipeline="fast", epochs=1, eval_data_path=data, image_freq=1),
            *more,
        ]
        run_beitv2_pretraining.main(pretraining_flags(data, tmp_path / name, codes, *flags))
        run_vqkd_training.main(vqkd_flags(data, tmp_path / f"{name}_vqkd", *flags, "--color_jitter", "0.4"))
    for stage in ("", "_vqkd"):
        assert_same_weights(
            tmp_path / f"worker{stage}/checkpoint.pth", tmp_path / f"device{stage}/checkpoint.pth"
        )
        lines = [log_lines(tmp_path / f"{name}{stage}")[0] for name in ("worker", "device")]
        assert [line["train_loss"] for line in lines] == [lines[0]["train_loss"]] * 2
        assert [line["test_loss"] for line in lines] == [lines[0]["test_loss"]] * 2
        pictures = [sorted((tmp_path / f"{name}{stage}/pictures").iterdir()) for name in ("worker", "device")]
        assert pictures[0]
        assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]
