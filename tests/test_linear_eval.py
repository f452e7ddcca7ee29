"""Linear probe: every layer's classifier learns, the backbone does not; resumption and
several processes are exact.
"""

import re

import pytest
import timm
import torch
from many_processes import two_processes
from refusals import refused
from tiny_runs import SIZE, STUDENT, as_flags, assert_same_weights, checkpoint, log_lines, photos, student

import pretrained
import run_linear_eval
from engine_for_linear_eval import LinearHeads
from evaluation import frozen_backbone
from evaluation.frozen_backbone import Backbone, FrozenBackbone
from runtime.device import Precision
from transforms import normalization

LAYERS = 6  # of the demo size


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return student(tmp_path_factory.mktemp("weights") / "student.pth")


def flags(data, weights, out, *more):
    where = [
        *as_flags(data_set="image_folder", data_path=data, eval_data_path=data, output_dir=out),
    ]
    return [
        *where,
        *SIZE,
        *as_flags(finetune=weights, batch_size=4, epochs=2, lr=0.1),
        *more,
    ]


@pytest.mark.slow
def test_every_layer_learns_to_tell_stripes_apart(data, weights, tmp_path):
    more = ["--features", "cls_mean", "--epochs", "160", "--lr", "5", "--eval_freq", "80"]
    run_linear_eval.main(flags(data, weights, tmp_path, "--cached_features", *more))
    last = log_lines(tmp_path)[-1]
    of_layers = [last[f"test_acc1_layer{layer}"] for layer in range(1, LAYERS + 1)]
    assert min(of_layers) >= 90
    assert last["test_acc1"] == max(of_layers) == of_layers[last["test_layer"] - 1]
    assert last["test_images"] == 16
    assert last["train_loss"] < 0.7 * LAYERS * 0.6931  # without learning: log 2 per layer
    heads = checkpoint(tmp_path / "checkpoint-best.pth")["model"]
    assert heads.keys() == {
        "mean",
        "std",
        *(f"heads.{i}.{part}" for i in range(LAYERS) for part in ("weight", "bias")),
    }
    assert heads["heads.5.weight"].shape == (2, 256)


def test_random_crops_are_the_default_and_the_backbone_stays(data, weights, tmp_path, monkeypatch):
    opened = []

    def remembered(*args, **kwargs):
        opened.append(open_backbone(*args, **kwargs))
        return opened[-1]

    open_backbone = pretrained.open_backbone
    monkeypatch.setattr(pretrained, "open_backbone", remembered)
    run_linear_eval.main(flags(data, weights, tmp_path, "--features", "cls_mean"))
    model = opened[0][0]
    fresh, _ = open_backbone(str(weights), 32)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    lines = log_lines(tmp_path)
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    content = checkpoint(tmp_path / "checkpoint.pth")
    assert content["model"]["heads.0.weight"].shape == (2, 256)
    # Statistics of the channels: of the training images in center crops, each once.
    args = run_linear_eval.get_parser().parse_args(flags(data, weights, tmp_path))
    args.aa, args.reprob, args.remode, args.recount = "none", 0.0, "pixel", 1
    args.look = None, "bicubic"
    images = run_linear_eval.build_dataset(args, train=True, augment=False)[0]
    batch = torch.stack([images[index]["image"] for index in range(len(images))])
    backbone = Backbone(fresh, (32, 32), *normalization(False))
    features = FrozenBackbone(backbone, "cls_mean", Precision("cpu", None))(batch)
    assert torch.allclose(content["model"]["mean"], features.mean(0), atol=1e-4)
    assert torch.allclose(content["model"]["std"], features.std(0, correction=0), rtol=1e-2)


@pytest.mark.parametrize(("more", "cropped"), [([], True), (["--cached_features"], False)])
def test_training_images_are_only_cropped_and_flipped(more, cropped, data, weights, tmp_path, monkeypatch):
    built, build = [], run_linear_eval.build_dataset

    def remembered(args, train, **how):
        built.append((train, build(args, train, **how)[0]))
        return build(args, train, **how)

    monkeypatch.setattr(run_linear_eval, "build_dataset", remembered)
    run_linear_eval.main(flags(data, weights, tmp_path, "--epochs", "1", *more))
    train = next(dataset for of_training, dataset in built if of_training)
    assert torch.equal(train[0, 3]["image"], train[1, 3]["image"]) is not cropped  # two epochs
    parts = train.view.steps.transforms
    acting = [
        step
        for part in parts
        for step in getattr(part, "transforms", [part])
        if getattr(step, "hue", 0) is not None
    ]
    steps = [type(step).__name__ for step in acting]  # a color jitter of strength 0 has None for a range
    # above 32 pixels: RandomResizedCrop
    assert steps[:2] == ["Resize", "RandomCrop" if cropped else "CenterCrop"]
    assert not {"ColorJitter", "RandomErasing", "RandAugment"} & set(steps)


def test_heads_see_channels_of_mean_0_and_variance_1():
    features = torch.randn(50, 3, 8) * torch.logspace(-1, 3, 8) + 5
    heads = LinearHeads(3, 8, 8)
    heads.standardize_by(features.split(7))
    for head in heads.heads:
        torch.nn.init.eye_(head.weight)
    logits = heads(features)  # (3, 50, 8)
    assert logits.shape == (3, 50, 8)
    assert logits.mean(1).abs().max() < 1e-4
    assert logits.var(1, correction=0).sub(1).abs().max() < 1e-3


def test_layers_do_not_disturb_each_other(data, weights, tmp_path, monkeypatch):
    """The first layer's classifier ends the same whether the others are there or
    not.
    """
    run_linear_eval.main(flags(data, weights, tmp_path / "all", "--cached_features"))
    original = frozen_backbone.FrozenBackbone.__call__
    monkeypatch.setattr(
        frozen_backbone.FrozenBackbone, "__call__", lambda self, images: original(self, images)[:, :1]
    )
    monkeypatch.setattr(run_linear_eval, "LinearHeads", lambda layers, *shape: LinearHeads(1, *shape))
    run_linear_eval.main(flags(data, weights, tmp_path / "first", "--cached_features"))
    both = [
        checkpoint(tmp_path / name / "checkpoint.pth")["model"]["heads.0.weight"] for name in ("all", "first")
    ]
    assert torch.allclose(*both, rtol=1e-5, atol=1e-7)
    assert both[0].abs().max() > 1e-3


@pytest.mark.parametrize("more", [[], ["--cached_features"]])
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(more, data, weights, tmp_path):
    more = [*more, "--epochs", "3", "--save_ckpt_freq", "1"]
    run_linear_eval.main(flags(data, weights, tmp_path / "whole", *more))
    first = ["--resume", str(tmp_path / "whole/checkpoint-0.pth")]
    run_linear_eval.main(flags(data, weights, tmp_path / "resumed", *more, *first))
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "resumed/checkpoint.pth")
    assert [line["epoch"] for line in log_lines(tmp_path / "resumed")] == [1, 2]


@pytest.mark.slow
def test_two_processes_end_where_one_ends(data, weights, tmp_path):
    odd = photos(tmp_path / "odd", per_class=5)
    (odd / "b" / "0.jpg").unlink()  # 9 images to validate: the ranks hold 5 and 4
    more = ["--cached_features", "--eval_data_path", str(odd)]
    two_processes("run_linear_eval.py", flags(data, weights, tmp_path / "two", *more))
    run_linear_eval.main(flags(data, weights, tmp_path / "one", *more, "--batch_size", "8"))
    for mine, other in zip(log_lines(tmp_path / "two"), log_lines(tmp_path / "one"), strict=True):
        assert mine["test_images"] == 9
        for key in mine.keys() - {"seconds"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-3), key


def test_the_learning_rate_is_for_256_images(data, weights, tmp_path, capsys):
    run_linear_eval.main(flags(data, weights, tmp_path, "--cached_features", "--lr", "1e-3"))
    assert "lr         1.56e-05 = 0.001 x 4 / 256" in capsys.readouterr().out
    parsed = run_linear_eval.get_parser().parse_args(["--data_path", "x", "--finetune", "y"])
    assert parsed.lr * 8 * 128 / 256 == pytest.approx(4e-3)  # the recipe


def test_which_features_a_file_gives(weights, data, tmp_path, capsys):
    without = student(tmp_path / "without.pth", STUDENT.removesuffix("_cls_pt"))
    expected = {
        (weights, "--linear"): "cls of 6",
        (without, "--linear"): "cls_mean of 6",
        (weights, "--knn"): "cls of layer 6",
    }
    expected |= {(without, "--knn"): "mean of layer 6"}
    for (file, mode), text in expected.items():
        run_linear_eval.main(flags(data, file, tmp_path / f"{text}", mode, "--epochs", "1"))
        assert f"features   {text}" in capsys.readouterr().out


def test_the_checkpoints_normalization_counts(data, tmp_path, capsys):
    for own in (True, False):
        file = student(tmp_path / f"{own}.pth", imagenet_default_mean_and_std=own)
        run_linear_eval.main(flags(data, file, "", "--knn", "--imagenet_default_mean_and_std"))
        out = capsys.readouterr().out
        assert ("ImageNet's mean and std" in out) is own
        assert ("was trained with mean and std 0.5" in out) is not own


def test_classifiers_of_another_backbone_are_not_resumed(data, weights, tmp_path, capsys):
    run_linear_eval.main(flags(data, weights, tmp_path / "out", "--cached_features"))
    other = student(tmp_path / "other.pth")
    assert "were trained with --finetune" in refused(
        run_linear_eval.main, flags(data, other, tmp_path / "out", "--cached_features"), capsys
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--cached_features", "--vflip", "0.5"],
            "--vflip acts on random crops, and --cached_features takes center crops",
        ),
        (
            ["--knn", "--min_crop_scale", "0.5"],
            "--min_crop_scale acts on random crops, and --knn takes center",
        ),
        (["--knn", "--cached_features"], "--cached_features acts with --linear"),
        (["--knn_k", "5"], "--knn_k acts with --knn alone"),
        (["--knn", "--knn_layer", "7"], "--knn_layer 7: the backbone has 6 blocks, 1 to 6"),
        (["--eval_data_path", ""], "--eval_data_path is missing: name the folder of validation images"),
        (["--finetune", "/nowhere.pth"], "/nowhere.pth is neither a file, nor a URL"),
        (["--nb_classes", "3"], "--nb_classes 3: the data has 2 classes"),
        (["--input_size", "40"], "--input_size: input size .* is not a multiple of the patch size"),
    ],
)
def test_what_cannot_act_is_refused_in_one_sentence(more, message, data, weights, capsys):
    error = refused(run_linear_eval.main, flags(data, weights, "", *more), capsys)
    assert re.search(message, error)
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_network_of_timm_is_probed(data, tmp_path, capsys):
    """A ViT layer by layer, a CNN by its last map; resumed from its own checkpoint."""
    vit = dict(img_size=32, embed_dim=32, depth=3, num_heads=2)
    for name, args, layers, dim in (("vit_tiny_patch16_224", vit, 3, 32), ("resnet10t", {}, 1, 512)):
        model = timm.create_model(name, **args)
        timm.models.save_for_hf(model, tmp_path / name, model_args=args)
        source, out = f"timm:local-dir:{tmp_path / name}", tmp_path / f"{name}_out"
        more = ["--cached_features", *as_flags(save_ckpt_freq=1)]
        run_linear_eval.main(flags(data, source, out, *more, "--epochs", "1"))
        run_linear_eval.main(flags(data, source, out, *more))
        assert checkpoint(out / "checkpoint.pth")["model"]["mean"].shape == (layers, dim)
        assert len(log_lines(out)) == 2
        assert f"test_acc1_layer{layers}" in log_lines(out)[0]
