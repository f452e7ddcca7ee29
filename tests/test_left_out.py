"""An image that does not decode counts in no figure: 12 validation images of which 5
are cut short are a 1, b 6.
"""

import json

import pytest
import torch
from many_processes import run_ranks
from tiny_runs import (
    SIZE,
    as_flags,
    labeled_pixels,
    log_lines,
    photos,
    pretraining_flags,
    segmentation_flags,
    student,
    tokenizer,
    vqkd_flags,
)

import run_beitv2_pretraining
import run_linear_eval
import run_segmentation_finetuning
import run_vqkd_training
from data_pipeline.image_lists import find_classes_folder
from data_pipeline.samplers import LoaderSettings, build_eval_loader
from datasets import ImageFiles
from engine_for_finetuning import FinetuningStage
from evaluation.held_out import evaluation_batches
from runtime.device import Precision
from runtime.distributed import Launch
from transforms import eval_view

CPU = torch.device("cpu")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:300])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("labeled")
    photos(root / "train", per_class=6)
    photos(root / "val", per_class=6)
    for number in range(1, 6):
        cut_short(root / "val" / "a" / f"{number}.jpg")
    return root


class Brightness(torch.nn.Module):
    def forward(self, images):
        return torch.stack((images.mean((1, 2, 3)), images.amax((1, 2, 3))), dim=1)


def counted(rank, world, folder):
    dataset = ImageFiles(find_classes_folder(folder)[0], eval_view(32))
    loader = build_eval_loader(dataset, LoaderSettings(batch_size=2), Launch(rank, world), CPU)
    results, confusion = FinetuningStage(CPU, Precision("cpu", None), loader).measure(Brightness())
    return {
        "of_class": confusion.by_class()[1].tolist(),
        "results": results,
        "training": "image" in dataset[1],
    }


@pytest.mark.slow
def test_classification_on_one_process_and_two(data, caplog, monkeypatch):
    monkeypatch.setattr("runtime.terminal.log.propagate", True)
    alone = counted(0, 1, str(data / "val"))
    assert alone["of_class"] == [1, 6] and alone["results"]["test_images"] == 7
    assert alone["training"]  # there the next image takes its place
    assert (
        "5 of 12 images of --eval_data_path cannot be read and do not count: " in caplog.text
        and "a/1.jpg" in caplog.text
    )
    assert "using the next image" not in caplog.text
    for of_rank in run_ranks(counted, 2, str(data / "val")):
        assert of_rank["of_class"] == [1, 6]
        assert of_rank["results"] == pytest.approx(alone["results"])


@pytest.mark.parametrize(
    "mode",
    [
        ["--knn", "--knn_k", "3"],
        ["--linear", "--epochs", "1"],
        ["--linear", "--epochs", "1", "--cached_features"],
    ],
)
def test_frozen_features(mode, data, tmp_path):
    flags = [
        *as_flags(finetune=student(tmp_path / "student.pth"), data_set="image_folder"),
        *SIZE,
        *as_flags(batch_size=4),
    ]
    flags += [
        *as_flags(data_path=data / "train", eval_data_path=data / "val", output_dir=tmp_path),
    ]
    run_linear_eval.main([*flags, *mode])
    knn = "--knn" in mode
    found = json.loads((tmp_path / "knn.json").read_text()) if knn else log_lines(tmp_path)[-1]
    assert found["knn_images" if knn else "test_images"] == 7


def test_held_out_loss_of_pretraining_and_of_the_tokenizer(data, tmp_path):
    """The same as without the broken files."""
    whole = photos(tmp_path / "whole", per_class=6)
    for number in range(1, 6):
        (whole / "a" / f"{number}.jpg").unlink()
    losses = {}
    for name, held_out in (("broken", data / "val"), ("whole", whole)):
        more = ["--epochs", "1", "--warmup_epochs", "0", "--eval_data_path", str(held_out)]
        run_vqkd_training.main(vqkd_flags(data / "train", tmp_path / name, *more))
        losses[name] = log_lines(tmp_path / name)[-1]["test_loss"]
    assert losses["broken"] == pytest.approx(losses["whole"], rel=1e-6)
    dataset = ImageFiles(
        [(str(data / "val" / "a" / f"{number}.jpg"), None) for number in range(6)], eval_view(32)
    )
    loader = build_eval_loader(dataset, LoaderSettings(batch_size=2), Launch(), CPU)
    assert [batch["index"].tolist() for batch in evaluation_batches(loader, CPU)] == [[0]]
    more = ["--epochs", "1", "--warmup_epochs", "0", "--eval_data_path", str(data / "val")]
    codes = tokenizer(tmp_path / "tokenizer.pth")
    run_beitv2_pretraining.main(pretraining_flags(data / "train", tmp_path / "student", codes, *more))
    assert log_lines(tmp_path / "student")[-1]["test_loss"] > 0


def test_segmentation(tmp_path, capsys):
    root = labeled_pixels(tmp_path / "pixels")
    cut_short(root / "images" / "validation" / "1.jpg")
    flags = segmentation_flags(
        root, tmp_path / "out", "--max_steps", "2", "--steps_per_epoch", "2", "--image_freq", "1"
    )
    run_segmentation_finetuning.main(flags)
    broken = log_lines(tmp_path / "out")[-1]
    assert "1 of 3 images of --eval_data_path cannot be read and do not count" in capsys.readouterr().out
    for kind, ending in (("images", "jpg"), ("annotations", "png")):
        (root / kind / "validation" / f"1.{ending}").unlink()
    run_segmentation_finetuning.main([*flags, "--output_dir", str(tmp_path / "without")])
    assert broken["test_miou"] == log_lines(tmp_path / "without")[-1]["test_miou"]


def test_nothing_but_broken_images_is_no_figure(data, tmp_path):
    paths = [(str(data / "val" / "a" / f"{number}.jpg"), 0) for number in range(1, 6)]
    loader = build_eval_loader(ImageFiles(paths, eval_view(32)), LoaderSettings(batch_size=2), Launch(), CPU)
    with pytest.raises(Exception, match="no image could be read, 5 files failed"):
        list(evaluation_batches(loader, CPU, "--eval_data_path"))
