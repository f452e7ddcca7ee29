"""A 1000-class model on ImageNet-A, -R and -Sketch, and mirror images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from tiny_classifier import classifier, eval_flags, results, timms_table
from tiny_runs import checkpoint, finetuning_flags, photos

import run_class_finetuning
from data_pipeline import imagenet_classes
from engine_for_finetuning import SomeLogits, WithMirrorImage


def noise(folder: Path, names: list[str]) -> Path:
    """folder/name/0.png: 40 x 40 pixels of other noise each; one odd-sided gradient
    makes left and right differ.
    """
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


def images_of(folder: Path, out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """As the evaluation sees them, and the labels in the order of the folders."""
    args = run_class_finetuning.arguments.parse(run_class_finetuning.get_parser(), eval_flags(folder, out))
    dataset, _ = run_class_finetuning.build_dataset(args, train=False, own_classes=True)
    samples = [dataset[i] for i in range(len(dataset))]
    return torch.stack([sample["image"] for sample in samples]), torch.tensor(
        [sample["label"] for sample in samples]
    )


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
    assert got["test_acc1"] == pytest.approx(got["test_balanced_acc"])  # one image per class
    assert len(set(logits.argmax(1).tolist())) > 3  # the model does tell images apart,
    assert (chosen.argmax(1) != logits.argmax(1)).any()  # and most of its first choices are not among the 200
    first = got["worst_classes"][0]
    row = timms_table("imagenet_r_synsets").index(first["class"])
    assert first["taken_for"]["class"] == timms_table("imagenet_r_synsets")[int(chosen[row].argmax())]
    out = capsys.readouterr().out
    assert f"ImageNet-R  test_loss {got['test_loss']:.4g}" in out
    assert "most often taken for" in out


@pytest.mark.slow
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


class Table(torch.nn.Module):
    """Logits by hand: the mean of the left half for class 0, of the right half for
    class 1, of all for class 2.
    """

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
    # The mean logits would call all three equally likely; two of the 200 classes:
    # chosen before the softmax.
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


def test_weights_without_an_average(weights, imagenet_r, tmp_path, capsys):
    assert "no moving average" in refused(
        run_class_finetuning.main,
        eval_flags(imagenet_r, tmp_path, "--resume", str(weights[0]), "--model_ema"),
        capsys,
    )
