"""Finished classifiers on images without labels, and evaluated by their file alone."""

import csv
from pathlib import Path

import pytest
import timm
import torch
from many_processes import two_processes
from PIL import Image
from refusals import refused
from tiny_classifier import MODEL, classifier, results
from tiny_runs import as_flags, checkpoint, finetuning_flags, log_lines, photos, student

import modeling_finetune
import run_class_finetuning
from transforms import eval_view, normalization

HERE = as_flags(device="cpu", amp_dtype="fp32", num_workers=0)
UNLIKE_THE_DEFAULTS = as_flags(input_size=48, crop_pct=0.75, imagenet_default_mean_and_std=True, use_cls=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on six classes of stripes whose every flag is another than the default, its
    images in data/.
    """
    folder = tmp_path_factory.mktemp("trained")
    data = photos(folder / "data", per_class=2, classes="abcdef")
    more = as_flags(epochs=1, warmup_epochs=0, lr=1e-2, model_ema=True, model_ema_decay=0.5)
    run_class_finetuning.main([*finetuning_flags(data, folder / "run"), *UNLIKE_THE_DEFAULTS, *more])
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    """Five images, one of them below a folder, and a file that is none."""
    folder = photos(tmp_path / "new", per_class=2, classes="xy", size=60)
    (folder / "a, b.jpg").write_bytes((folder / "x/0.jpg").read_bytes())
    (folder / "y/broken.jpg").write_bytes(b"no image")
    return folder


def predict(source: Path, images: Path, out: Path, *more: str) -> list[dict[str, str]]:
    run_class_finetuning.main([*as_flags(predict=images, resume=source, output_dir=out), *HERE, *more])
    with open(out / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def expected(source: Path, images: Path, rows: list[dict[str, str]]) -> torch.Tensor:
    """Probabilities (images, classes) of the model as it was trained."""
    model = modeling_finetune.create_model(
        MODEL,
        img_size=48,
        num_classes=6,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        use_mean_pooling=False,
    ).eval()
    model.load_state_dict(checkpoint(source)["model"])
    mean, std = normalization(True)
    view = eval_view(48, 0.75, mean=mean, std=std)
    batch = torch.stack([view(Image.open(images / row["path"]))["image"] for row in rows])
    with torch.no_grad():
        return model(batch).softmax(dim=1)


def test_predictions_are_those_of_the_trained_model(trained, images, tmp_path, capsys):
    source = trained / "run/checkpoint.pth"
    rows = predict(source, images, tmp_path / "out")
    assert [row["path"] for row in rows] == ["a, b.jpg", "x/0.jpg", "x/1.jpg", "y/0.jpg", "y/1.jpg"]
    assert (tmp_path / "out/unreadable.txt").read_text() == "y/broken.jpg\n"
    likeliest = expected(source, images, rows).topk(5)
    for row, probabilities, numbers in zip(rows, likeliest.values, likeliest.indices, strict=True):
        columns = list(row.values())[1:]
        assert columns[::2] == ["abcdef"[number] for number in numbers]
        assert [float(value) for value in columns[1::2]] == pytest.approx(probabilities.tolist(), abs=1e-5)
    assert ",".join(rows[0]) == (
        "path,class,probability,class_2,probability_2,class_3,probability_3,class_4,probability_4,"
        "class_5,probability_5"
    )
    out = capsys.readouterr().out
    assert f"as trained --model {MODEL}, --use_cls, --input_size 48" in out
    assert "predicted  5 of 6 images" in out
    assert "1 of 6 files cannot be read" in out


def test_average_mirror_and_single_image(trained, images, tmp_path):
    source = trained / "run/checkpoint.pth"
    plain = predict(source, images / "x/1.jpg", tmp_path / "plain")
    assert [row["path"] for row in plain] == ["1.jpg"]
    average = predict(source, images / "x/1.jpg", tmp_path / "average", "--model_ema")
    mirrored = predict(source, images / "x/1.jpg", tmp_path / "mirrored", "--tta_flip")
    assert len({row[0]["probability"] for row in (plain, average, mirrored)}) == 3


def test_evaluation_needs_no_model_flags(trained, tmp_path, capsys):
    flags = as_flags(eval=True, eval_data_path=trained / "data", output_dir=tmp_path)
    run_class_finetuning.main([*flags, "--resume", str(trained / "run/checkpoint.pth"), *HERE])
    got, log = results(tmp_path), log_lines(trained / "run")[0]
    for key in ("test_loss", "test_acc1", "test_images"):
        assert got[key] == pytest.approx(log[key])
    assert "warning" not in capsys.readouterr().out


def test_a_folder_of_timm_answers_as_in_timm(images, tmp_path):
    """Its own size, mean, crop and names: a Beit of another shape than any of ours."""
    args = dict(img_size=48, embed_dim=32, depth=2, num_heads=2, init_values=0.5)
    facts = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=0.8)
    cfg = dict(input_size=(3, 48, 48), **facts)
    model = timm.create_model(
        "beitv2_base_patch16_224", **args, num_classes=2, pretrained_cfg_overlay=cfg
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    names = {"label_names": ["p", "q"]}
    timm.models.save_for_hf(model, tmp_path / "timm", model_config=names, model_args=args)
    rows = predict(tmp_path / "timm", images, tmp_path / "out")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    for row in rows:
        with torch.no_grad():
            wanted = model(transform(Image.open(images / row["path"]))[None]).softmax(dim=1)[0]
        assert list(row) == ["path", "class", "probability", "class_2", "probability_2"]
        assert float(row["probability"]) == pytest.approx(float(wanted.max()), abs=1e-5)
        assert row["class"] == "pq"[int(wanted.argmax())]


def test_classes_without_names_are_numbered_and_said_so(images, tmp_path, capsys):
    classifier(3, tmp_path / "bare.pth")
    rows = predict(
        tmp_path / "bare.pth", images, tmp_path / "out", "--layer_decay", "0.5", "--data_set", "CIFAR"
    )
    assert {row["class_3"] for row in rows} <= {"class 0", "class 1", "class 2"}
    out = capsys.readouterr().out
    assert "holds no names of its classes" in out
    assert "--layer_decay does nothing here: the model is finished" in out
    assert "--data_set does nothing here: --predict names the images" in out


def test_nothing_readable_leaves_an_earlier_table_alone(trained, images, tmp_path, capsys):
    source, out = trained / "run/checkpoint.pth", tmp_path / "out"
    predict(source, images, out)
    before = (out / "predictions.csv").read_bytes()
    for path in images.rglob("*.jpg"):
        path.write_bytes(b"")
    flags = as_flags(predict=images, resume=source, output_dir=out)
    error = refused(run_class_finetuning.main, [*flags, *HERE], capsys)
    assert "no image could be read" in error
    assert (out / "predictions.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "x.pth", "--predict", "/nowhere"], "--predict /nowhere: no such file or folder"),
        (["--predict", "."], "--predict needs a trained model"),
        (["--resume", "x.pth", "--predict", ".", "--eval"], "give one of them"),
        (["--resume", "x.pth", "--predict", ".", "--output_dir", ""], "name a folder for it"),
        (["--resume", "x.pth", "--predict", ".", "--robust_test", "sketch"], "--robust_test acts on"),
    ],
)
def test_mistakes_end_in_a_sentence(flags, message, tmp_path, capsys):
    assert message in refused(run_class_finetuning.main, ["--output_dir", str(tmp_path), *flags], capsys)


def test_a_pretrained_file_and_odd_sizes_are_refused(trained, images, tmp_path, capsys):
    flags = as_flags(predict=images, output_dir=tmp_path, resume=student(tmp_path / "pt.pth"))
    assert "a classifier is needed" in refused(run_class_finetuning.main, [*flags, *HERE], capsys)
    flags = as_flags(
        predict=images, output_dir=tmp_path, resume=trained / "run/checkpoint.pth", input_size=40
    )
    error = refused(run_class_finetuning.main, [*flags, *HERE], capsys)
    assert "--input_size: input size (40, 40) is not a multiple of the patch size" in error


@pytest.mark.slow
def test_two_processes_write_the_same_table(trained, images, tmp_path):
    source = trained / "run/checkpoint.pth"
    flags = [*as_flags(predict=images, resume=source, batch_size=2), *HERE]
    run_class_finetuning.main([*flags, "--output_dir", str(tmp_path / "one")])
    two_processes("run_class_finetuning.py", [*flags, "--output_dir", str(tmp_path / "two")])
    for name in ("predictions.csv", "unreadable.txt"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
