"""run_segmentation_finetuning as main([...]) on tiny data: what it writes, resumption,
processes, evaluation, predictions.
"""

import json
import math

import numpy as np
import pytest
import torch
from many_processes import two_processes
from PIL import Image
from refusals import refused
from tiny_runs import (
    as_flags,
    assert_same_weights,
    checkpoint,
    finetuning_flags,
    kill_after,
    labeled_pixels,
    log_lines,
    photos,
    segmentation_flags,
    student,
)

import modeling_segmentation
import run_class_finetuning
import run_segmentation_finetuning
from checkpoint_io import downloads, published, weight_source
from engine_for_segmentation import Scores
from run_segmentation_finetuning import main
from schedules import Schedule, poly_scheduler
from segmentation import trained_segmenter

EXACT = ["--drop_path", "0", "--head_drop", "0"]  # what these draw depends on the rank


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return labeled_pixels(tmp_path_factory.mktemp("ade"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run long enough to tell the three colors apart."""
    out = tmp_path_factory.mktemp("trained")
    main(
        segmentation_flags(
            data, out, "--max_steps", "40", "--steps_per_epoch", "20", "--image_freq", "1", "--lr", "3e-3"
        )
    )
    return out


def test_it_learns_and_writes_what_the_other_stages_write(trained):
    first, last = log_lines(trained)
    assert last["epoch"] == 1
    assert last["train_loss"] == pytest.approx(
        last["train_seg_loss"] + 0.4 * last["train_aux_loss"], rel=1e-4
    )
    assert last["train_loss"] < first["train_loss"]
    assert last["test_miou"] > 70  # the most frequent class everywhere: 11 to 22
    content = checkpoint(trained / "checkpoint.pth")
    assert content["stage"]["classes"] == ["class 0", "class 1", "class 2"]
    assert {"checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-best.pth"} <= {
        path.name for path in trained.iterdir()
    }
    assert Image.open(trained / "pictures" / "segmentation-0001.png").width > 3 * 40


def test_the_rate_falls_along_the_polynomial_until_max_steps(data, tmp_path):
    """7 steps of 3 per epoch: two whole epochs and one of a single step."""
    main(segmentation_flags(data, tmp_path, "--max_steps", "7", "--poly_power", "2", "--warmup_steps", "2"))
    lines = log_lines(tmp_path)
    schedule = poly_scheduler(1e-3, 0.0, 7, 2, 2.0)
    assert [line["train_lr"] for line in lines] == pytest.approx([schedule[2], schedule[5], schedule[6]])
    assert checkpoint(tmp_path / "checkpoint.pth")["next"]["step"] == 7


def test_poly_schedule_by_hand():
    values = poly_scheduler(1.0, 0.1, 10, 4, 1.0)
    assert values[0] == pytest.approx(1e-6)
    assert values[2] == pytest.approx((0.1 + 0.9 * 0.8) * 0.5)
    assert values[9] == pytest.approx(0.1 + 0.9 * 0.1)
    assert poly_scheduler(1.0, 0.0, 10)[0] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [2, 4])
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(stop_after, data, tmp_path, monkeypatch):
    """In the middle of an epoch and of the cut last one."""
    more = ["--max_steps", "5", "--save_ckpt_steps", "1"]
    main(segmentation_flags(data, tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        kill_after(stop_after, patch)
        with pytest.raises(KeyboardInterrupt):
            main(segmentation_flags(data, tmp_path / "parts", *more))
    main(segmentation_flags(data, tmp_path / "parts", *more))
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "parts/checkpoint.pth")
    whole, parts = (log_lines(tmp_path / name) for name in ("whole", "parts"))
    assert [line["test_miou"] for line in whole] == [line["test_miou"] for line in parts]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(data, tmp_path):
    """Batch norm sees the images of both; every image is evaluated once (three images,
    so one rank has two).
    """
    # Every pixel labeled: a loss is the mean over its own rank's pixels.
    more = [*EXACT, "--nb_classes", "4", "--scale_range", "1", "2"]
    one = segmentation_flags(data, tmp_path / "one", *more, "--batch_size", "4")
    two = segmentation_flags(data, tmp_path / "two", *more)
    for flags in (one, two):
        flags.remove("--reduce_zero_label")
    main(one)
    two_processes("run_segmentation_finetuning.py", two)
    for alone, shared in zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "two"), strict=True):
        for key in ("train_seg_loss", "train_aux_loss", "train_grad_norm"):
            assert shared[key] == pytest.approx(alone[key], rel=1e-3), key
        assert shared["test_miou"] == pytest.approx(alone["test_miou"], abs=0.5)
    more = ["--eval", "--resume", str(tmp_path / "one/checkpoint.pth")]
    main(segmentation_flags(data, tmp_path / "eval1", *more))
    two_processes("run_segmentation_finetuning.py", segmentation_flags(data, tmp_path / "eval2", *more))
    first, second = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("eval1", "eval2"))
    assert first == second


def test_evaluation_is_that_of_a_confusion_matrix(trained, data, tmp_path):
    """--eval from the checkpoint's file alone; against labels and predictions counted
    by hand at the masks' size.
    """
    more = [
        *as_flags(resume=trained / "checkpoint-best.pth", device="cpu", amp_dtype="fp32", num_workers=0),
    ]
    main(["--eval", "--data_path", str(data), "--output_dir", str(tmp_path), *more])
    result = json.loads((tmp_path / "eval.json").read_text())
    best = max(line["test_miou"] for line in log_lines(trained))
    assert result["test_miou"] == pytest.approx(best, abs=1e-6)
    main(["--predict", str(data / "images/validation"), "--output_dir", str(tmp_path), *more])
    matrix = np.zeros((3, 3))
    for path in (data / "annotations/validation").iterdir():
        truth = np.array(Image.open(path)).astype(int) - 1
        predicted = Image.open(tmp_path / "predictions" / f"{path.stem}_labels.png")
        assert predicted.mode == "P"
        numbers = np.array(predicted).astype(int) - 1  # as in the masks: the first class is 1
        np.add.at(matrix, (truth[truth >= 0], numbers[truth >= 0]), 1)
    iou = 100 * np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert result["test_miou"] == pytest.approx(iou.mean(), abs=1e-6)
    assert [row["iou"] for row in result["classes"].values()] == pytest.approx(list(iou), abs=1e-6)
    assert result["test_aacc"] == pytest.approx(100 * np.diag(matrix).sum() / matrix.sum(), abs=1e-6)


def test_predictions_keep_folders_and_pass_over_broken_files(trained, data, tmp_path, capsys):
    images = tmp_path / "mine" / "deep"
    images.mkdir(parents=True)
    Image.open(data / "images/validation/0.jpg").resize((90, 33)).save(images / "a.png")
    (images / "b.jpg").write_bytes(b"no image")
    flags = [
        *as_flags(device="cpu", resume=trained / "checkpoint.pth", output_dir=tmp_path / "out"),
    ]
    main(["--predict", str(tmp_path / "mine"), *flags, "--eval_scales", "0.5", "1.5", "--tta_flip"])
    folder = tmp_path / "out/predictions/deep"
    assert sorted(path.name for path in folder.iterdir()) == ["a_labels.png", "a_overlay.png"]
    assert Image.open(folder / "a_labels.png").size == (90, 33)
    assert "b.jpg" in capsys.readouterr().out


@pytest.mark.slow
def test_it_starts_from_pretraining_and_from_segmentation_models(trained, data, tmp_path, capsys):
    start = student(tmp_path / "pt.pth")
    main(segmentation_flags(data, tmp_path / "a", "--finetune", str(start), "--max_steps", "3"))
    assert "copied     the shared relative position bias to 6 blocks" in capsys.readouterr().out
    main(
        segmentation_flags(
            data, tmp_path / "b", "--finetune", str(trained / "checkpoint.pth"), "--max_steps", "3"
        )
    )
    assert "heads      used 82 of 82 tensors" in capsys.readouterr().out


def test_a_released_checkpoint_loads_strictly(tmp_path):
    """mmseg's file: `state_dict` with the backbone's, the decode head's and the
    auxiliary head's names.
    """
    torch.manual_seed(0)
    model = modeling_segmentation.create_model(
        "upernet_beit_demo_patch16",
        5,
        img_size=64,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        init_values=0.1,
    ).eval()
    torch.save({"meta": {"CLASSES": ("a", "b")}, "state_dict": model.state_dict()}, tmp_path / "released.pth")
    content = trained_segmenter.read_segmenter(str(tmp_path / "released.pth"), "--resume")
    built = trained_segmenter.build_segmenter(content, "it")
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(built(x), model(x))
    assert built.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--input_size", "40"], "--input_size 40 is not a multiple of the patch size 16"),
        (["--eval"], "--eval needs a trained model"),
        (["--predict", "x", "--resume", "y", "--output_dir", ""], "--predict writes pictures"),
        (["--model", "upernet_beit_bas_patch16"], "did you mean upernet_beit_base_patch16"),
        (["--warmup_steps", "6"], "--warmup_steps 6 is as long as the run of --max_steps 6"),
        (["--nb_classes", "2"], ".png: label 3, but --reduce_zero_label makes labels 1 to 2 the 2 classes"),
        (["--scale_range", "2", "1"], "--scale_range 2.0 1.0"),
        (["--stride", "33"], "--stride 33 is larger than the windows of --input_size 32"),
        (["--stride", "16", "--whole_image"], "leave one of them out"),
        (["--batch_size", "1"], "batch norm needs two images at once"),
        (["--head_drop", "1"], "--head_drop: '1' is not a number from 0 and below 1"),
        (["--eval", "--predict", ".", "--resume", "x"], "give one of them"),
        (["--predict", "nowhere", "--resume", "x"], "--predict nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_told_in_a_sentence(flags, sentence, data, tmp_path, capsys):
    assert sentence in refused(main, segmentation_flags(data, tmp_path, *flags), capsys)


def test_broken_validation_masks_are_found_before_training(tmp_path, capsys):
    data = labeled_pixels(tmp_path / "ade")
    Image.fromarray(np.full((40, 56), 9, np.uint8)).save(data / "annotations/validation/1.png")
    with pytest.raises(SystemExit):
        main(segmentation_flags(data, tmp_path / "out"))
    assert "annotations/validation/1.png: label 9" in (said := capsys.readouterr()).err
    assert "epoch 1" not in said.out


def test_nothing_labeled_is_an_error(tmp_path, trained, capsys):
    data = labeled_pixels(tmp_path / "ade")
    for path in (data / "annotations/validation").iterdir():
        Image.fromarray(np.zeros((40, 56), np.uint8)).save(path)
    assert "not one pixel is labeled; 255 and 0 are ignored (--reduce_zero_label)" in refused(
        main,
        segmentation_flags(data, tmp_path / "out", "--eval", "--resume", str(trained / "checkpoint.pth")),
        capsys,
    )


@pytest.mark.parametrize(
    ("white", "reduce_zero_label", "said"),
    [
        (255, True, "not one pixel is labeled"),
        (255, False, "every labeled pixel is of class 'class 0'"),
        (1, True, "'class 0'"),
    ],
)
def test_masks_that_teach_nothing_are_refused_at_the_start(white, reduce_zero_label, said, tmp_path, capsys):
    data = labeled_pixels(tmp_path / "ade")
    for path in (data / "annotations").rglob("*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 1, white, 0).astype(np.uint8)).save(path)
    flags = segmentation_flags(data, tmp_path / "out", "--disable_eval")
    with pytest.raises(SystemExit):
        main([flag for flag in flags if reduce_zero_label or flag != "--reduce_zero_label"])
    printed = capsys.readouterr()
    assert said in printed.err and "(0 and 255) as numbers of classes" in printed.err
    assert "epoch 1" not in printed.out


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("3", "6"), ("6", "3")])
def test_the_length_of_an_epoch_changes_neither_schedule_nor_end(before, after, data, tmp_path, monkeypatch):
    flags = ["--max_steps", "12", "--save_ckpt_steps", "1"]
    rates = []
    original = Schedule.apply
    monkeypatch.setattr(
        Schedule, "apply", lambda self, optimizer, step: (rates.append(step), original(self, optimizer, step))
    )
    with monkeypatch.context() as patch:
        kill_after(6, patch)
        with pytest.raises(KeyboardInterrupt):
            main(segmentation_flags(data, tmp_path, *flags, "--steps_per_epoch", before))
    assert rates[:7] == list(range(7))
    del rates[:]
    main(segmentation_flags(data, tmp_path, *flags, "--steps_per_epoch", after))
    assert rates == list(range(6, 12))
    assert checkpoint(tmp_path / "checkpoint.pth")["next"]["step"] == 12


def test_the_command_line_overrides_the_file_also_with_a_default(trained, data, tmp_path, capsys):
    more = [
        *as_flags(eval=True, data_path=data, resume=trained / "checkpoint.pth", device="cpu"),
    ]
    main([*more, "--output_dir", str(tmp_path), "--lr", "3"])
    said = capsys.readouterr().out
    assert "as trained --input_size 32, --reduce_zero_label" in said
    assert "--lr does nothing here: the model is finished" in said
    assert "3 classes are labels 0 to 2" in refused(main, [*more, "--keep_zero_label"], capsys)
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    assert "it has 3 classes, here are 4" in refused(
        main, [*more, "--class_names", str(tmp_path / "names.txt")], capsys
    )


def test_one_image_its_namesake_and_an_earlier_prediction(trained, data, tmp_path, capsys):
    for ending in ("jpg", "png"):
        Image.open(data / "images/validation/0.jpg").save(tmp_path / f"a.{ending}")
    flags = ["--device", "cpu", "--resume", str(trained / "checkpoint.pth"), "--output_dir", str(tmp_path)]
    for _ in range(2):  # its own pictures are not labeled the second time
        main(["--predict", str(tmp_path), *flags])
        assert "2 of 2 images" in capsys.readouterr().out
    labels = sorted(path.name for path in (tmp_path / "predictions").glob("*_labels.png"))
    assert labels == ["a.jpg_labels.png", "a.png_labels.png"]
    main(["--predict", str(tmp_path / "a.jpg"), *flags])
    assert (tmp_path / "predictions/a_labels.png").is_file()
    (tmp_path / "b.jpg").write_bytes(b"broken")
    assert "no image could be read" in refused(main, ["--predict", str(tmp_path / "b.jpg"), *flags], capsys)


def test_other_kinds_of_files_are_called_by_name(data, trained, tmp_path, capsys):
    assert "is a model of masked image modeling (for --finetune): a segmentation model is needed" in refused(
        main,
        segmentation_flags(data, tmp_path, "--eval", "--resume", str(student(tmp_path / "pt.pth"))),
        capsys,
    )
    images = photos(tmp_path / "photos")
    assert "a segmentation model" in refused(
        run_class_finetuning.main,
        finetuning_flags(images, tmp_path, "--eval", "--resume", str(trained / "checkpoint.pth")),
        capsys,
    )


def test_published_segmentation_models_open_as_they_were_trained(monkeypatch, tmp_path):
    name = "beitv2_base_patch16_224_pt1k_ftade20k"
    assert published.ENTRIES[name].kind == "segmentation"
    torch.save(
        {"state_dict": {"decode_head.conv_seg.weight": torch.zeros(150, 8, 1, 1)}}, tmp_path / f"{name}.pth"
    )
    monkeypatch.setattr(downloads, "fetch", lambda source: tmp_path / f"{name}.pth")
    assert weight_source.read_weights(name).flags["imagenet_default_mean_and_std"] is True


def test_nothing_to_score_is_no_number():
    scores = Scores(50.0, 50.0, 50.0, [50.0, math.nan], [50.0, math.nan])
    table = run_segmentation_finetuning.format_table(scores, ["seen", "unseen"])
    assert any("seen" in line for line in table)
    assert not any("unseen" in line for line in table)
