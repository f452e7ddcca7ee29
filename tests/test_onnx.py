"""ONNX files: onnxruntime computes what our networks do, with batches of any size."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from refusals import refused
from tiny_classifier import classifier
from tiny_runs import as_flags, checkpoint, student, tokenizer

import export_checkpoint
from checkpoint_io import onnx_format
from pretrained import open_backbone


def run(path, images: torch.Tensor) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, {"image": images.numpy()})[0]


def export(source, output) -> None:
    export_checkpoint.main([str(source), *as_flags(to="onnx", output=output)])


@pytest.mark.slow
def test_a_classifier_in_onnxruntime(tmp_path, capsys):
    model = classifier(4, tmp_path / "c.pth")
    torch.save(
        checkpoint(tmp_path / "c.pth")
        | {"stage": {"classes": ["a", "b", "c", "d"]}, "args": {"imagenet_default_mean_and_std": True}},
        tmp_path / "c.pth",
    )
    export(tmp_path / "c.pth", tmp_path / "out/c.onnx")
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            wanted = model(images).numpy()
        assert np.abs(run(tmp_path / "out/c.onnx", images) - wanted).max() < 1e-4
    facts = onnxruntime.InferenceSession(tmp_path / "out/c.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["a", "b", "c", "d"]
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c.onnx"]
    out = capsys.readouterr().out
    assert "onnxruntime computes the same to" in out
    assert "left out   nothing" in out


@pytest.mark.slow
def test_a_pretrained_transformer_gives_its_tokens(tmp_path):
    weights = student(tmp_path / "pt.pth")
    export(weights, tmp_path / "pt.onnx")
    model, _ = open_backbone(str(weights))
    images = torch.randn(3, 3, 32, 32)
    state = checkpoint(weights)["model"]
    with torch.no_grad():
        last = model.get_intermediate_layers(images)[-1]
        wanted = torch.nn.functional.layer_norm(
            last, (128,), state["norm.weight"], state["norm.bias"], eps=1e-6
        )
    assert np.abs(run(tmp_path / "pt.onnx", images) - wanted.numpy()).max() < 1e-4


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, capsys, monkeypatch):
    classifier(4, tmp_path / "c.pth")
    monkeypatch.setattr(onnx_format, "measure_difference", lambda *_: 0.01)
    flags = [str(tmp_path / "c.pth"), *as_flags(to="onnx", output=tmp_path / "c.onnx")]
    assert "onnxruntime differs from torch by 0.01" in refused(export_checkpoint.main, flags, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_mistakes_end_in_a_sentence(tmp_path, capsys):
    weights = tokenizer(tmp_path / "vqkd.pth")
    for name, message in (
        ("x.onnx", "--to onnx: onnx has no such model"),
        ("x.pth", "a name that ends in .onnx"),
    ):
        flags = [str(weights), *as_flags(to="onnx", output=tmp_path / name)]
        assert message in refused(export_checkpoint.main, flags, capsys)
