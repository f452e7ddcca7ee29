"""Features written to files: those of the backbone, in the order of the paths; any
network of timm with its own normalization.
"""

import importlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from many_processes import two_processes
from PIL import Image
from refusals import refused
from tiny_data import photo
from tiny_runs import as_flags, photos, student

import extract_features
import modeling_finetune
from evaluation.frozen_backbone import FrozenBackbone, open_frozen
from pretrained import open_backbone
from runtime.device import choose_precision
from transforms import eval_view, normalization

HERE = as_flags(device="cpu", num_workers=0, batch_size=2)
FACTS = dict(mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.25), crop_pct=0.8, interpolation="bilinear")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Five images in two folders, and a file that is none."""
    folder = photos(tmp_path_factory.mktemp("images"), per_class=2, classes="ba", size=60)
    (folder / "z.jpg").write_bytes((folder / "a/0.jpg").read_bytes())
    (folder / "a/broken.jpg").write_bytes(b"no image")
    return folder


PATHS = ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg", "z.jpg"]


def extract(source: object, images: Path, out: Path, *more: str) -> np.ndarray:
    extract_features.main([str(source), str(images), "--output", str(out), *HERE, *more])
    return np.load(out)


def timm_folder(folder: Path, name: str, size: int, **args: object) -> tuple[str, torch.nn.Module]:
    """As on timm's hub, with weights that tell images apart; the name by which it opens,
    and timm's model.
    """
    overlay = dict(input_size=(3, size, size), test_input_size=None, **FACTS)
    model = timm.create_model(name, **args, num_classes=0, pretrained_cfg_overlay=overlay).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    timm.models.save_for_hf(model, folder, model_args=args)
    return f"timm:local-dir:{folder}", model


def timm_batch(model: torch.nn.Module, images: Path) -> torch.Tensor:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return torch.stack([transform(Image.open(images / path)) for path in PATHS])


def test_features_of_our_checkpoints_in_the_order_of_paths(images, tmp_path, capsys):
    weights = student(tmp_path / "pt.pth", imagenet_default_mean_and_std=True)
    out = extract(weights, images, tmp_path / "out/f.npy")
    assert (tmp_path / "out/f.paths.txt").read_text().splitlines() == PATHS
    model, _ = open_backbone(str(weights))
    mean, std = normalization(True)
    view = eval_view(32, mean=mean, std=std)
    batch = torch.stack([view(Image.open(images / path))["image"] for path in PATHS])
    layers = model.get_intermediate_layers(batch)
    assert out.dtype == np.float32
    assert torch.allclose(torch.from_numpy(out), layers[-1][:, 0], atol=1e-5)  # a CLS head in the file
    for number, layer in ((2, 1), (-2, -2)):
        patches = extract(weights, images, tmp_path / "p.npy", *as_flags(pool="patches", layer=number))
        assert torch.allclose(torch.from_numpy(patches), layers[layer][:, 1:], atol=1e-5)
    said = capsys.readouterr().out
    assert "cls of layer 6 of 6; images of 32 x 32 pixels, normalized by ImageNet's" in said
    assert "1 of 6 files cannot be read and are left out" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"f.npy", "f.paths.txt"}


def test_a_batch_that_the_memory_does_not_hold_is_halved(tmp_path, caplog, monkeypatch):
    weights = student(tmp_path / "pt.pth")
    encode = FrozenBackbone(open_frozen(str(weights)), "mean", choose_precision("fp32", torch.device("cpu")))
    images, plain, held = torch.rand(7, 3, 32, 32), encode.encode, 3
    expected = encode(images)

    def with_little_memory(part):
        if len(part) > held:
            raise torch.OutOfMemoryError("out of memory")
        return plain(part)

    monkeypatch.setattr(encode, "encode", with_little_memory)
    for _ in range(2):
        assert torch.allclose(encode(images), expected, atol=1e-6)
    assert caplog.text.count("does not hold 7 images: from here on 3 at once") == 1
    held = 0
    with pytest.raises(torch.OutOfMemoryError):
        encode(images)


def test_features_of_photos_decoded_at_a_reduced_size(tmp_path):
    weights, folder = student(tmp_path / "pt.pth"), tmp_path / "large"
    folder.mkdir()
    photo(900, 700).save(folder / "a.jpg", quality=95)
    exact, fast = (
        extract(weights, folder, tmp_path / "f.npy", "--data_pipeline", way) for way in ("exact", "fast")
    )
    assert 0 < np.abs(exact - fast).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("name", ["ours", "timm"])
def test_blocks_after_the_layer_asked_for_are_not_computed(name, tmp_path):
    args = dict(img_size=56, embed_dim=32, depth=3, num_heads=2)
    if name == "ours":
        network = modeling_finetune.create_model("beit_demo_patch16_128", img_size=56 // 14 * 16)
        model, blocks, x = network, network.blocks, torch.rand(2, 3, 64, 64)
    else:
        source, _ = timm_folder(tmp_path / "vit", "vit_small_patch14_reg4_dinov2", 56, **args)
        model = open_frozen(source).model
        blocks, x = model.network.blocks, torch.rand(2, 3, 56, 56)
    depth, computed = model.get_num_layers(), []
    for number, block in enumerate(blocks, 1):
        block.register_forward_hook(lambda *_, number=number: computed.append(number))
    with torch.no_grad():
        every = model.eval().get_intermediate_layers(x)
        for layer in (1, 2, depth):
            computed.clear()
            (alone,) = model.get_intermediate_layers(x, layer)
            assert computed == list(range(1, layer + 1))
            assert torch.equal(alone, every[layer - 1])


def test_a_vit_of_timm_gives_what_it_gives_in_timm(images, tmp_path):
    """With registers, layer scale and patches of 14, which none of our models has."""
    args = dict(img_size=56, embed_dim=32, depth=3, num_heads=2)
    source, model = timm_folder(tmp_path / "vit", "vit_small_patch14_reg4_dinov2", 56, **args)
    batch = timm_batch(model, images)
    with torch.no_grad():
        tokens = model.forward_features(batch)
        first = model.forward_intermediates(batch, indices=[0], intermediates_only=True, output_fmt="NLC")[0]
    assert tokens.shape[1] == 1 + 4 + 16
    for pool, wanted in (("auto", tokens[:, 0]), ("mean", tokens[:, 5:].mean(1)), ("patches", tokens[:, 5:])):
        out = extract(source, images, tmp_path / "f.npy", "--pool", pool)
        assert np.abs(out - wanted.numpy()).max() < 1e-5
    out = extract(source, images, tmp_path / "f.npy", *as_flags(pool="patches", layer=1))
    assert np.abs(out - first.numpy()).max() < 1e-5
    larger = extract(source, images, tmp_path / "f.npy", *as_flags(pool="patches", input_size=84))
    assert larger.shape == (5, 36, 32)


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [
        ("resnet10t", 64, {}),
        (
            "swin_tiny_patch4_window7_224",
            56,
            dict(img_size=56, embed_dim=16, depths=(1, 1), num_heads=(1, 2)),
        ),
    ],
)
def test_networks_without_tokens_give_their_last_map(name, size, args, images, tmp_path, capsys):
    source, model = timm_folder(tmp_path / "net", name, size, **args)
    with torch.no_grad():
        wanted = model(timm_batch(model, images))
    out = extract(source, images, tmp_path / "f.npy")
    assert np.abs(out - wanted.numpy()).max() < 1e-4
    flags = [source, str(images), *as_flags(output=tmp_path / "x.npy", pool="cls"), *HERE]
    assert "--pool cls: this network has no CLS token" in refused(extract_features.main, flags, capsys)


def test_parquet_holds_the_same(images, tmp_path):
    parquet = importlib.import_module("pyarrow.parquet")
    weights = student(tmp_path / "pt.pth")
    for pool in ("mean", "patches"):
        expected = extract(weights, images, tmp_path / "f.npy", "--pool", pool)
        flags = [str(weights), str(images), *as_flags(output=tmp_path / "f.parquet", pool=pool), *HERE]
        extract_features.main(flags)
        table = parquet.read_table(tmp_path / "f.parquet")
        assert table.column_names == ["path", "feature"]
        assert table["path"].to_pylist() == PATHS
        assert np.array_equal(np.array(table["feature"].to_pylist(), dtype=np.float32), expected)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "f.csv"], "--output f.csv: the name must end in .npy or .parquet"),
        (["--output", "."], "--output .: the name must end in"),
        (["--layer", "7"], "--layer 7: this network has layers 1 to 6, or -6 to -1"),
        (["--layer", "0"], "--layer 0"),
        (["--input_size", "40"], "is not a multiple of the patch size"),
    ],
)
def test_mistakes_end_in_a_sentence(more, message, images, tmp_path, capsys):
    weights = student(tmp_path / "pt.pth")
    flags = [str(weights), str(images), "--output", str(tmp_path / "f.npy"), *HERE, *more]
    assert message in refused(extract_features.main, flags, capsys)


def test_unknown_sources_end_in_a_sentence(images, tmp_path, capsys):
    for source, message in (
        ("timm:vit_smal_patch16_224", "did you mean vit_small_patch16_224"),
        ("timm:local-dir:/nowhere", "timm cannot open local-dir:/nowhere"),
        ("/nowhere/x.pth", "/nowhere/x.pth is neither a file"),
    ):
        flags = [source, str(images), "--output", str(tmp_path / "f.npy"), *HERE]
        assert message in refused(extract_features.main, flags, capsys)
    (tmp_path / "empty").mkdir()
    flags = [str(student(tmp_path / "pt.pth")), str(tmp_path / "empty"), "--output", str(tmp_path / "f.npy")]
    assert "no images in this folder" in refused(extract_features.main, [*flags, *HERE], capsys)


@pytest.mark.slow
def test_two_processes_write_the_same_file(images, tmp_path):
    weights = student(tmp_path / "pt.pth")
    flags = [str(weights), str(images), *HERE]
    extract_features.main([*flags, "--output", str(tmp_path / "one.npy")])
    two_processes("extract_features.py", [*flags, "--output", str(tmp_path / "two.npy")])
    assert (tmp_path / "one.paths.txt").read_text() == (tmp_path / "two.paths.txt").read_text()
    assert np.allclose(np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy"), atol=1e-5)
    assert not list(tmp_path.glob(".*"))
