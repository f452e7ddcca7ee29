"""Evaluation of a model that we trained: as in its training, and told where it is
not.
"""

import functools
from pathlib import Path

import pytest
import torch
from many_processes import two_processes
from refusals import refused
from tiny_classifier import MODEL, classifier, eval_flags, results
from tiny_runs import checkpoint, finetuning_flags, log_lines, photos

import arguments
import run_class_finetuning
from evaluation import trained_classifier
from evaluation.run_flags import RunFlags


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three classes of stripes; the folder of a run with a moving average, and its
    training images.
    """
    folder = tmp_path_factory.mktemp("trained")
    data = photos(folder / "data", per_class=4, classes="abc")
    flags = finetuning_flags(data, folder / "run", "--epochs", "1", "--model_ema", "--model_ema_decay", "0.5")
    run_class_finetuning.main([*flags, "--lr", "1e-2"])
    return folder


def trained_flags(trained: Path, images: Path, out: Path, *more: str) -> list[str]:
    return eval_flags(images, out, "--resume", str(trained / "run/checkpoint.pth"), *more)


def evaluate(trained: Path, images: Path, out: Path, *more: str) -> None:
    run_class_finetuning.main(trained_flags(trained, images, out, *more))


def test_evaluation_agrees_with_training_for_weights_and_average(trained, tmp_path):
    log = log_lines(trained / "run")[0]
    evaluate(trained, trained / "data", tmp_path / "plain")
    evaluate(trained, trained / "data", tmp_path / "ema", "--model_ema")
    plain, ema = results(tmp_path / "plain"), results(tmp_path / "ema")
    for key in ("loss", "acc1", "acc5", "balanced_acc", "images"):
        assert plain[f"test_{key}"] == pytest.approx(log[f"test_{key}"])
        assert ema[f"test_{key}"] == pytest.approx(log[f"test_ema_{key}"])
    assert plain["test_loss"] != pytest.approx(ema["test_loss"], rel=1e-4)
    assert (plain["model_ema"], ema["model_ema"]) == (False, True)


def test_labels_follow_the_training_classes_without_its_images(trained, tmp_path, capsys):
    stage = checkpoint(trained / "run/checkpoint.pth")["stage"]
    assert stage == {"classes": ["a", "b", "c"]}
    (tmp_path / "some").mkdir()
    for name in "ac":  # c is class 2, not 1
        (tmp_path / "some" / name).symlink_to(trained / "data" / name)
    evaluate(trained, trained / "data", tmp_path / "all", "--worst_classes", "3")
    evaluate(trained, tmp_path / "some", tmp_path / "out", "--worst_classes", "3")
    by_class = [
        {line["class"]: line["recall"] for line in results(tmp_path / out)["worst_classes"]}
        for out in ("all", "out")
    ]
    assert {"a": by_class[0]["a"], "c": by_class[0]["c"]} == by_class[1]
    assert results(tmp_path / "out")["test_balanced_acc"] == pytest.approx(
        (by_class[0]["a"] + by_class[0]["c"]) / 2
    )
    other = photos(tmp_path / "other", per_class=1, classes="abd")
    assert "class folder 'd' is not a class of the training data" in refused(
        run_class_finetuning.main, trained_flags(trained, other, tmp_path / "x"), capsys
    )


def test_other_classes_on_resume_are_refused_if_names_are_known(trained, tmp_path, capsys):
    other = photos(tmp_path / "other", per_class=4, classes="abd")
    flags = finetuning_flags(
        other, tmp_path / "out", "--resume", str(trained / "run/checkpoint.pth"), "--allow_changed_run"
    )
    assert "its class 2 is 'c', here it is 'd'" in refused(run_class_finetuning.main, flags, capsys)
    old = checkpoint(trained / "run/checkpoint.pth") | {"stage": {}}
    torch.save(old, tmp_path / "old.pth")
    run_class_finetuning.main([*flags, "--resume", str(tmp_path / "old.pth")])
    assert checkpoint(tmp_path / "out/checkpoint.pth")["stage"] == {"classes": ["a", "b", "d"]}


@pytest.mark.parametrize(
    ("flags", "theirs", "ours"),
    [
        (
            ["--imagenet_default_mean_and_std"],
            "no --imagenet_default_mean_and_std",
            "with --imagenet_default_mean_and_std",
        ),
        (["--input_size", "48"], "--input_size 32", "--input_size 48"),
        (["--crop_pct", "0.5"], "no --crop_pct", "--crop_pct 0.5"),
    ],
)
def test_images_unlike_those_of_the_training_are_told(flags, theirs, ours, trained, tmp_path, capsys):
    evaluate(trained, trained / "data", tmp_path, *flags)
    out = capsys.readouterr().out
    assert f"was trained with {theirs} and is evaluated" in out
    assert ours in out


@pytest.mark.parametrize(
    ("flags", "tensor", "way_out"),
    [
        (["--use_cls"], "it lacks norm.weight", "--use_mean_pooling"),
        (["--abs_pos_emb"], "it lacks pos_embed", "no --abs_pos_emb"),
        (
            ["--disable_rel_pos_bias"],
            "also holds blocks.0.attn.relative_position_bias_table",
            "--rel_pos_bias",
        ),
        (["--disable_qkv_bias"], "also holds blocks.0.attn.q_bias", "--qkv_bias"),
        (["--layer_scale_init_value", "0"], "also holds blocks.0.gamma_1", "--layer_scale_init_value 0.1"),
        (["--model", "beit_tiny_patch16_224"], "it lacks cls_token", f"--model {MODEL}"),
    ],
)
def test_another_model_than_the_trained_one_is_refused(flags, tensor, way_out, trained, tmp_path, capsys):
    error = refused(
        run_class_finetuning.main, trained_flags(trained, trained / "data", tmp_path, *flags), capsys
    )
    assert tensor in error
    assert f"it was trained with {way_out}" in error


def test_nothing_is_told_about_a_model_used_as_it_was_trained(trained, tmp_path, capsys):
    evaluate(trained, trained / "data", tmp_path, "--dist_eval")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "warning" in line] == [
        "warning: --dist_eval does nothing: evaluation is always shared by all processes, and every image "
        "counts once"
    ]


def test_published_weights_by_name_without_their_flags(trained, tmp_path, capsys, monkeypatch):
    """A demo-sized model of 32-pixel images under a published name, where a download
    would lie.
    """
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = "beitv2_base_patch16_224_pt1k_ft1k"
    (tmp_path / "checkpoints").mkdir()
    classifier(3, tmp_path / "checkpoints" / f"{name}.pth")
    flags = eval_flags(trained / "data", tmp_path / "out", "--finetune", name)
    run_class_finetuning.main(flags)
    assert "as trained --imagenet_default_mean_and_std" in capsys.readouterr().out
    flags.append("--imagenet_default_mean_and_std")
    run_class_finetuning.main(flags)
    assert results(tmp_path / "out")["weights"] == name
    out = capsys.readouterr().out
    assert "warning" not in out
    assert "as trained" not in out
    # the file tells by the shape of its bias tables
    run_class_finetuning.main([*flags, "--input_size", "48"])
    assert "trained on images of another size than --input_size 48" in capsys.readouterr().out
    assert "it was trained with --model beit_base_patch16_224" in refused(
        run_class_finetuning.main, [*flags, "--use_cls"], capsys
    )


@pytest.mark.slow
def test_two_processes_count_every_image_once(trained, tmp_path):
    images = photos(tmp_path / "images", per_class=3, classes="abc")
    (images / "b/0.jpg").unlink()  # 8 images in batches of 3: shares of 4 and 4; a ninth in none
    flags = [
        *eval_flags(images, tmp_path / "two", "--tta_flip"),
        "--resume",
        str(trained / "run/checkpoint.pth"),
    ]
    flags += ["--batch_size", "3", "--worst_classes", "3"]
    two_processes("run_class_finetuning.py", flags)
    run_class_finetuning.main([*flags, "--output_dir", str(tmp_path / "one"), "--batch_size", "32"])
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert two["test_images"] == 8
    assert sum(line["images"] for line in two["worst_classes"]) == 8
    assert two.pop("test_loss") == pytest.approx(one.pop("test_loss"), rel=1e-5)
    assert two == one


TABLE, EMBEDDING = "blocks.0.attn.relative_position_bias_table", "pos_embed"


@pytest.mark.parametrize(
    ("keys", "flags", "theirs"),
    [
        ([TABLE], {}, None),  # published files tell nothing of their normalization
        ([TABLE], {"imagenet_default_mean_and_std": False}, None),
        ([TABLE], {"imagenet_default_mean_and_std": True}, "--imagenet_default_mean_and_std"),
        ([EMBEDDING], {}, "--abs_pos_emb, --disable_rel_pos_bias"),  # somebody else's ViT: its weights say it
        # a tokenizer's encoder
        ([EMBEDDING], {"process_type": "imagenet_norm", "imagenet_default_mean_and_std": False},
         "--abs_pos_emb, --disable_rel_pos_bias, --imagenet_default_mean_and_std"),
        ([TABLE], {"process_type": "default", "imagenet_default_mean_and_std": True}, None),
    ],
)  # fmt: skip
def test_fine_tuning_unlike_the_pretraining_is_told(keys, flags, theirs, caplog):
    parser = run_class_finetuning.get_parser()
    args = parser.parse_args(["--finetune", "x.pth"])
    with caplog.at_level("WARNING", logger="beit"):
        ours = RunFlags(vars(args), functools.partial(arguments.format_flag, parser))
        weights = dict.fromkeys(keys, torch.zeros(1))
        trained_classifier.warn_of_other_pretraining(weights, flags, ours, f"`finetune` {args.finetune}")
    assert (
        caplog.messages == []
        if theirs is None
        else f"x.pth was trained with {theirs} and is fine" in caplog.messages[0]
    )
