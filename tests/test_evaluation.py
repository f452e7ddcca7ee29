"""Evaluating a finished classifier: ImageNet-A, -R and -Sketch, mirror images, confused
classes, and what must fit what.
"""

import functools
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from many_processes import run_ranks, two_processes
from PIL import Image
from refusals import refused
from tiny_runs import SIZE, as_flags, checkpoint, finetuning_flags, log_lines, photos

import arguments
import modeling_finetune
import run_class_finetuning
from data_pipeline import imagenet_classes
from engine_for_finetuning import SomeLogits, WithMirrorImage
from errors import UserError
from evaluation import confusion, trained_classifier
from evaluation.confusion import Confusion, WorstClass, describe_worst, format_worst

CPU = torch.device("cpu")
MODEL = "beit_demo_patch16_128"
# Class 0: 4 images, one right, two taken for 2, one for 1; class 1: always right; class
# 2: 2 images, both taken for 0.
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
ANSWERS = torch.tensor([0, 2, 1, 2, 1, 1, 1, 0, 0])


# ── Counting ──


def dense(confusion: Confusion, classes: int) -> torch.Tensor:
    """(classes, classes): row = true class, column = predicted class."""
    labels, predictions, counts = confusion.pairs()
    return counts.new_zeros(classes, classes).index_put_((labels, predictions), counts)


@pytest.mark.parametrize("pending", [1, 4, 1000])
def test_confusion_by_hand(pending, monkeypatch):
    monkeypatch.setattr(confusion, "PENDING", pending)
    counts = Confusion(CPU)
    for start in (0, 3, 6):
        counts.add(LABELS[start : start + 3], ANSWERS[start : start + 3])
    assert dense(counts, 4).tolist() == [[1, 1, 2, 0], [0, 3, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]
    correct, total = counts.by_class()  # the class without images is not among them
    assert correct.tolist() == [1, 3, 0]
    assert total.tolist() == [4, 3, 2]
    assert counts.worst(2) == [WorstClass(2, 2, 0, 0, 2), WorstClass(0, 4, 1, 2, 2)]
    assert counts.worst(9)[2] == WorstClass(1, 3, 3)


def test_ties_of_recall_go_by_images_and_of_answers_by_number():
    counts = Confusion(CPU)
    counts.add(torch.tensor([0, 1, 1, 2]), torch.tensor([2, 2, 0, 1]))
    assert counts.worst(3) == [
        WorstClass(1, 2, 0, 0, 1),
        WorstClass(0, 1, 0, 2, 1),
        WorstClass(2, 1, 0, 1, 1),
    ]


def test_the_table_names_classes_in_words():
    counts = Confusion(CPU)
    counts.add(LABELS, ANSWERS)
    lines = describe_worst(counts.worst(3), ["n01440764", "cat", "n99999999"])
    assert lines[1] == {
        "class": "n01440764",
        "name": "tench",
        "recall": 25.0,
        "images": 4,
        "taken_for": {"class": "n99999999", "name": "n99999999", "share": 50.0},
    }
    assert format_worst(lines) == [
        "class            recall  images  most often taken for",
        "n99999999          0.0%       2  n01440764 tench (100.0%)",
        "n01440764 tench   25.0%       4  n99999999 (50.0%)",
        "cat              100.0%       3  -",
    ]


def test_counts_of_many_classes_take_memory_for_the_pairs_alone():
    counts = Confusion(CPU)
    labels, answers = torch.randint(21841, (2, 5000))
    counts.add(labels, answers)
    first, second, number = counts.pairs()
    assert len(first) <= 5000
    assert int(number.sum()) == 5000
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == set(
        zip(labels.tolist(), answers.tolist(), strict=True)
    )


def _share(rank, world_size):
    both, first_alone = Confusion(CPU), Confusion(CPU)
    mine = slice(0, 3) if rank == 0 else slice(3, 9)
    both.add(LABELS[mine], ANSWERS[mine])
    if rank == 0:  # the other process has no images
        first_alone.add(LABELS, ANSWERS)
    both.sum_over_ranks()
    first_alone.sum_over_ranks()
    return torch.stack((dense(both, 3), dense(first_alone, 3)))


@pytest.mark.slow
def test_two_processes_count_as_one_also_where_one_has_no_images():
    for counts in run_ranks(_share, 2):
        assert counts.tolist() == [[[1, 1, 2], [0, 3, 0], [2, 0, 0]]] * 2


# ── ImageNet's class names ──


def timms_table(name):
    return (resources.files("timm.data") / "_info" / f"{name}.txt").read_text().split()


@pytest.mark.parametrize("letter", ["a", "r"])
def test_the_200_logits_are_those_of_timms_table(letter):
    folders = timms_table(f"imagenet_{letter}_synsets")
    robust = imagenet_classes.robust_set(f"imagenet_{letter}")
    assert imagenet_classes.logits_of(folders, robust, "") == [
        int(n) for n in timms_table(f"imagenet_{letter}_indices")
    ]


def test_imagenets_list():
    synsets = imagenet_classes.synsets()
    assert len(set(synsets)) == 1000
    assert synsets == sorted(synsets)  # what sorting the class folders gives
    assert imagenet_classes.logits_of(synsets, imagenet_classes.robust_set("sketch"), "") == list(range(1000))
    assert imagenet_classes.in_words("n01484850") == "great white shark"
    assert imagenet_classes.in_words("n00004475") == "organism"  # of ImageNet-21k alone
    assert imagenet_classes.in_words("n00000000") == "n00000000"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("imagenet_a", "ImageNet-A"),
        ("ImageNet-A", "ImageNet-A"),
        ("imagenet-r", "ImageNet-R"),
        ("IMAGENET_R", "ImageNet-R"),
        ("sketch", "ImageNet-Sketch"),
        ("imagenet_sketch", "ImageNet-Sketch"),
    ],
)
def test_spellings(text, name):
    assert imagenet_classes.robust_set(text).name == name


def test_other_names_are_told_the_three():
    with pytest.raises(UserError, match="imagenet_v2: give ImageNet-A, ImageNet-R or ImageNet-Sketch"):
        imagenet_classes.robust_set("imagenet_v2")


# ── A 1000-class model on ImageNet-A, -R and -Sketch ──


def classifier(classes: int, path: Path, **kwargs) -> modeling_finetune.VisionTransformer:
    """Random weights whose answers vary from image to image."""
    torch.manual_seed(3)
    shape = dict(
        img_size=32, num_classes=classes, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True
    )
    model = modeling_finetune.create_model(MODEL, **(shape | kwargs), init_scale=1.0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    torch.save({"model": model.state_dict()}, path)
    return model.eval()


def noise(folder: Path, names: list[str]) -> Path:
    """folder/name/0.png: 40 x 40 pixels of other noise each; one odd-sided gradient makes left and right differ."""
    for number, name in enumerate(names):
        pixels = np.random.RandomState(number).rand(5, 5, 3) * np.linspace(60, 255, 5)[None, :, None]
        (folder / name).mkdir(parents=True)
        Image.fromarray(pixels.astype("uint8")).resize((40, 40)).save(folder / name / "0.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "imagenet.pth"
    return path, classifier(1000, path)


@pytest.fixture(scope="module")
def imagenet_r(tmp_path_factory):
    return noise(tmp_path_factory.mktemp("imagenet") / "r", timms_table("imagenet_r_synsets"))


def eval_flags(images: Path, out: Path, *more: str) -> list[str]:
    flags = as_flags(eval=True, eval_data_path=images, output_dir=out, model=MODEL, batch_size=32)
    return [*flags, *SIZE[:-2], *more]


def images_of(folder: Path, out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """As the evaluation sees them, and the labels in the order of the folders."""
    args = run_class_finetuning.arguments.parse(run_class_finetuning.get_parser(), eval_flags(folder, out))
    dataset, _ = run_class_finetuning.build_dataset(args, train=False, own_classes=True)
    samples = [dataset[i] for i in range(len(dataset))]
    return torch.stack([sample["image"] for sample in samples]), torch.tensor(
        [sample["label"] for sample in samples]
    )


def results(out: Path) -> dict:
    return json.loads((out / "eval.json").read_text())


def test_imagenet_r_chooses_among_its_200_classes(weights, imagenet_r, tmp_path, capsys):
    path, model = weights
    run_class_finetuning.main(
        eval_flags(imagenet_r, tmp_path, "--robust_test", "ImageNet_R", "--finetune", str(path))
    )
    images, labels = images_of(imagenet_r, tmp_path)
    with torch.no_grad():
        logits = model(images)
    chosen = logits[:, [int(n) for n in timms_table("imagenet_r_indices")]]
    got = results(tmp_path)
    assert got["set"] == "ImageNet-R"
    assert got["test_images"] == 200
    assert got["test_loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(chosen, labels)), rel=1e-5
    )
    assert got["test_acc1"] == pytest.approx(100 * float((chosen.argmax(1) == labels).double().mean()))
    assert got["test_acc5"] == pytest.approx(
        100 * float((chosen.topk(5).indices == labels[:, None]).any(1).double().mean())
    )
    assert got["test_acc1"] == pytest.approx(got["test_balanced_acc"])  # one image a class
    assert len(set(logits.argmax(1).tolist())) > 3  # the model does tell images apart,
    assert (chosen.argmax(1) != logits.argmax(1)).any()  # and most of its first choices are not among the 200
    first = got["worst_classes"][0]
    row = timms_table("imagenet_r_synsets").index(first["class"])
    assert first["taken_for"]["class"] == timms_table("imagenet_r_synsets")[int(chosen[row].argmax())]
    out = capsys.readouterr().out
    assert f"ImageNet-R  test_loss {got['test_loss']:.4g}" in out
    assert "most often taken for" in out


def test_sketch_takes_1000_logits_and_a_complete_folder(weights, tmp_path, capsys):
    path, _ = weights
    folder = noise(tmp_path / "sketch", imagenet_classes.synsets()[:999])
    flags = eval_flags(
        folder, tmp_path / "out", "--robust_test", "sketch", "--resume", str(path), "--worst_classes", "3"
    )
    assert "has 999 class folders and ImageNet-Sketch has 1000" in refused(
        run_class_finetuning.main, flags, capsys
    )
    noise(folder, [imagenet_classes.synsets()[999]])
    run_class_finetuning.main(flags)
    assert results(tmp_path / "out")["set"] == "ImageNet-Sketch"
    assert len(results(tmp_path / "out")["worst_classes"]) == 3
    assert results(tmp_path / "out")["test_images"] == 1000
    plain = [*eval_flags(folder, tmp_path / "plain", "--resume", str(path))]
    run_class_finetuning.main(plain)  # all logits: the same as an ordinary evaluation
    assert results(tmp_path / "plain")["test_loss"] == results(tmp_path / "out")["test_loss"]
    assert results(tmp_path / "plain")["set"] == "validation"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--robust_test", "imagenet_c", "--resume", "x.pth"], "ImageNet-A, ImageNet-R or ImageNet-Sketch"),
        (
            ["--robust_test", "imagenet_a", "--resume", "x.pth", "--eval_data_path", "", "--data_path", "."],
            "as --eval_data_path",
        ),
        (["--worst_classes", "-1", "--resume", "x.pth"], "--worst_classes: '-1' is not"),
        (["--eval_data_path", "", "--resume", "x.pth"], "--data_path is missing"),
        (["--data_set", "CIFAR", "--resume", "x.pth"], "--data_path is missing"),
    ],
)
def test_mistakes_end_in_a_sentence(flags, message, tmp_path, capsys):
    assert message in refused(
        run_class_finetuning.main, eval_flags(tmp_path, tmp_path / "out", *flags), capsys
    )


@pytest.mark.parametrize("flags", [["--robust_test", "imagenet_a"], ["--tta_flip"], ["--worst_classes", "3"]])
def test_flags_of_evaluation_alone_are_refused_in_training(flags, tmp_path, capsys):
    assert f"{flags[0]} acts on a finished model: add --eval" in refused(
        run_class_finetuning.main, finetuning_flags(tmp_path, tmp_path / "out", *flags), capsys
    )


def test_training_needs_training_data(tmp_path, capsys):
    assert "--data_path is missing" in refused(
        run_class_finetuning.main, ["--eval_data_path", str(tmp_path)], capsys
    )


def test_robustness_folders_and_models_that_are_not_imagenets(weights, imagenet_r, tmp_path, capsys):
    path, _ = weights
    classifier(7, tmp_path / "seven.pth")
    renamed = checkpoint(path) | {"stage": {"classes": [f"class {number:03}" for number in range(1000)]}}
    torch.save(renamed, tmp_path / "renamed.pth")
    stripes = photos(tmp_path / "stripes", per_class=1)
    for folder, model, message in (
        (
            stripes,
            path,
            "class folder 'a' is none of ImageNet-1k's WordNet ids such as n01440764 (2 of 2 folders",
        ),
        (imagenet_r, tmp_path / "seven.pth", "needs a model of ImageNet's 1000 classes"),
        (imagenet_r, tmp_path / "renamed.pth", "tells 1000 others apart"),
    ):
        assert message in refused(
            run_class_finetuning.main,
            eval_flags(folder, tmp_path / "out", "--robust_test", "imagenet_r", "--resume", str(model)),
            capsys,
        )
    assert "has 200; for ImageNet-A or -R add --robust_test" in refused(
        run_class_finetuning.main, eval_flags(imagenet_r, tmp_path / "out", "--resume", str(path)), capsys
    )


# ── Mirror images ──


class Table(torch.nn.Module):
    """Logits by hand: the mean of the left half for class 0, of the right half for class 1, of all for class 2."""

    def forward(self, images):
        left, right = images[..., :2].mean((1, 2, 3)), images[..., 2:].mean((1, 2, 3))
        return torch.stack((left, right, (left + right) / 2), dim=1)


def test_mean_probability_of_an_image_and_its_mirror_image():
    images = torch.zeros(2, 3, 4, 4)
    images[0, ..., :2] = 2.0  # logits (2, 0, 1), mirrored (0, 2, 1)
    images[1] = 1.0
    expected = (torch.tensor([2.0, 0, 1]).softmax(0) + torch.tensor([0.0, 2, 1]).softmax(0)) / 2
    answer = WithMirrorImage(Table())(images)
    torch.testing.assert_close(answer[0].exp(), expected)
    torch.testing.assert_close(answer[0].softmax(0), expected)
    torch.testing.assert_close(answer, WithMirrorImage(Table())(images.flip(-1)))
    # The mean logits would call all three equally likely; two of the 200 classes: chosen before the softmax.
    torch.testing.assert_close(
        WithMirrorImage(SomeLogits(Table(), [2, 0]))(images)[0].exp().sum(), torch.tensor(1.0)
    )


def test_tta_flip_evaluates_both_views(weights, imagenet_r, tmp_path):
    path, model = weights
    more = ["--robust_test", "imagenet_r", "--resume", str(path)]
    run_class_finetuning.main(eval_flags(imagenet_r, tmp_path / "flip", *more, "--tta_flip"))
    images, labels = images_of(imagenet_r, tmp_path)
    chosen = [int(n) for n in timms_table("imagenet_r_indices")]
    with torch.no_grad():
        views = [model(view)[:, chosen].double().softmax(1) for view in (images, images.flip(3))]
    mean = (views[0] + views[1]) / 2
    got = results(tmp_path / "flip")
    assert got["tta_flip"] is True
    assert got["test_acc1"] == pytest.approx(100 * float((mean.argmax(1) == labels).double().mean()))
    losses = [float(-p[range(200), labels].log().mean()) for p in (mean, *views)]
    assert got["test_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] < (losses[1] + losses[2]) / 2 - 1e-4  # the two views do differ


# ── A model that we trained ──


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three classes of stripes; the folder of a run with a moving average, and its training images."""
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


def test_weights_without_an_average(weights, imagenet_r, tmp_path, capsys):
    assert "no moving average" in refused(
        run_class_finetuning.main,
        eval_flags(imagenet_r, tmp_path, "--resume", str(weights[0]), "--model_ema"),
        capsys,
    )


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
    assert "class folder 'd' is no class of the training data" in refused(
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
        "warning: --dist_eval does nothing: evaluation is always shared by all processes, and every "
        "image counts once"
    ]


def test_published_weights_by_name_without_their_flags(trained, tmp_path, capsys, monkeypatch):
    """A demo-sized model of 32-pixel images under a published name, where a download would lie."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = "beitv2_base_patch16_224_pt1k_ft1k"
    (tmp_path / "checkpoints").mkdir()
    classifier(3, tmp_path / "checkpoints" / f"{name}.pth")
    flags = eval_flags(trained / "data", tmp_path / "out", "--finetune", name)
    run_class_finetuning.main(flags)
    assert "trained with --imagenet_default_mean_and_std and is evaluated with no" in capsys.readouterr().out
    flags.append("--imagenet_default_mean_and_std")
    run_class_finetuning.main(flags)
    assert results(tmp_path / "out")["weights"] == name
    assert "warning" not in capsys.readouterr().out
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
        ours = trained_classifier.RunFlags(vars(args), functools.partial(arguments.format_flag, parser))
        weights = dict.fromkeys(keys, torch.zeros(1))
        trained_classifier.warn_of_other_pretraining(weights, flags, ours, f"`finetune` {args.finetune}")
    assert (
        caplog.messages == []
        if theirs is None
        else f"x.pth was trained with {theirs} and is fine" in caplog.messages[0]
    )
