"""Models by their id on Hugging Face's hub, and exports pushed to it; the hub is a
server on this machine.
"""

import json
import threading

import huggingface_hub
import pytest
import timm
import torch
import transformers
from hub_server import HubServer
from refusals import refused, user_reads
from tiny_classifier import classifier
from tiny_runs import as_flags, checkpoint, finetuning_flags, photos, student

import export_checkpoint
import run_class_finetuning
from checkpoint_io import hub, weight_source
from pretrained import open_backbone


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Asked instead of huggingface.co, with a cache of this test's own."""
    with HubServer() as hub_server:
        threading.Thread(target=hub_server.serve_forever, args=(0.05,), daemon=True).start()
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
        files = hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield hub_server
        hub_server.shutdown()


@pytest.fixture
def huggingface_model(server, tmp_path):
    """owner/tiny-beit on the server, and transformers' model of it."""
    torch.manual_seed(5)
    config = transformers.BeitConfig(
        image_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=3, use_relative_position_bias=True, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = transformers.BeitForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "hf")
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    server.models["owner/tiny-beit"] = files
    return model


def test_a_model_of_transformers_opens_by_its_id(server, huggingface_model):
    model, _ = open_backbone("owner/tiny-beit")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = model.get_intermediate_layers(images)[-1]
        theirs = huggingface_model.beit(images, output_hidden_states=True).hidden_states[-1]
    assert (ours - theirs).abs().max() < 1e-5
    server.downloads.clear()
    open_backbone("owner/tiny-beit")
    assert server.downloads == []  # from the cache


def test_finetuning_and_evaluation_take_an_id_of_timm(server, tmp_path, capsys):
    args = dict(img_size=32, embed_dim=32, depth=2, num_heads=2, init_values=0.1)
    model = timm.create_model("beitv2_base_patch16_224", **args, num_classes=2)
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=args, safe_serialization="both")
    server.models["timm/tiny.ours"] = {p.name: p.read_bytes() for p in (tmp_path / "timm").iterdir()}
    data = photos(tmp_path / "data", per_class=2)
    flags = as_flags(eval=True, eval_data_path=data, data_set="image_folder", finetune="timm/tiny.ours")
    flags += as_flags(device="cpu", num_workers=0, output_dir=tmp_path / "eval")
    run_class_finetuning.main(flags)
    assert json.loads((tmp_path / "eval/eval.json").read_text())["weights"] == "timm/tiny.ours"
    assert weight_source.read_weights("timm/tiny.ours").library == "timm"


def test_what_is_no_model_of_the_hub_is_told(server, tmp_path, monkeypatch):
    server.models["owner/empty"] = {"config.json": b"{}"}
    with user_reads("owner/none is no file here .*RepositoryNotFoundError"):
        weight_source.read_weights("owner/none")
    with user_reads("owner/empty: this model of Hugging Face's hub has no model.safetensors or"):
        weight_source.read_weights("owner/empty")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with user_reads("out/none is neither a file"):  # out is a folder here: a mistyped path
        weight_source.read_weights("out/none")


@pytest.mark.parametrize(
    ("source", "is_id"),
    [
        ("microsoft/beit-base-patch16-224", True),
        ("timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k", True),
        ("owner/name@v1.0", True),
        ("owner/checkpoint.pth", False),
        ("/owner/name", False),
        ("../name", False),
        ("a/b/c", False),
        ("beitv2_base_patch16_224_pt1k", False),
        ("https://example.org/x", False),
    ],
)
def test_ids_are_told_from_paths(source, is_id):
    assert hub.is_hub_id(source) == is_id


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = photos(folder / "data", per_class=2)
    run_class_finetuning.main(finetuning_flags(data, folder / "run", *as_flags(epochs=1, warmup_epochs=0)))
    (folder / "run/knn.json").write_text(json.dumps({"knn10_acc1": 87.5, "knn_images": 16}, indent=1))
    return folder


@pytest.mark.parametrize("library", ["timm", "huggingface"])
def test_a_pushed_model_opens_from_the_hub_with_its_card(library, server, run_folder, tmp_path, capsys):
    source = run_folder / "run/checkpoint.pth"
    flags = as_flags(to=library, output=tmp_path / "out", push_to_hub="me/stripes")
    export_checkpoint.main([str(source), *flags])
    assert "pushed     " in capsys.readouterr().out
    assert server.visibility == {"me/stripes": "private"}
    card = server.models["me/stripes"]["README.md"].decode()
    last = json.loads((run_folder / "run/log.txt").read_text().splitlines()[-1])
    assert f"| test_acc1 | {last['test_acc1']:.4g} | log.txt |" in card
    assert "| knn10_acc1 | 87.5 | knn.json |" in card
    assert "| layer_decay | 0.8 |" in card
    assert str(run_folder) not in card
    images = torch.randn(2, 3, 32, 32)
    ours = torch_model(source)
    call = card.split("model = ")[1].splitlines()[0]
    theirs = eval(call, {"timm": timm, "transformers": transformers}).eval()
    with torch.no_grad():
        wanted, found = ours(images), theirs(images)
    found = found if isinstance(found, torch.Tensor) else found.logits
    assert (wanted - found).abs().max() < 1e-4


def torch_model(source):
    model = run_class_finetuning.modeling_finetune.create_model(
        "beit_demo_patch16_128", img_size=32, num_classes=2, init_values=0.1,
        use_abs_pos_emb=False, use_rel_pos_bias=True,
    )  # fmt: skip
    model.load_state_dict(checkpoint(source)["model"])
    return model.eval()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "timm", "--output", "x.pth", "--push_to_hub", "me/x"], "--push_to_hub uploads a folder"),
        (["--to", "safetensors", "--output", "x.pth", "--push_to_hub", "me/x"], "uploads a folder"),
        (["--to", "timm", "--output", "x", "--push_to_hub", "stripes"], "as owner/name"),
    ],
)
def test_mistakes_end_in_a_sentence(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classifier(2, tmp_path / "c.pth")
    assert message in refused(export_checkpoint.main, ["c.pth", *flags], capsys)


def test_a_hub_that_refuses_leaves_the_files_here(server, tmp_path, capsys):
    server.shutdown()
    server.server_close()
    weights = student(tmp_path / "pt.pth")
    flags = as_flags(to="timm", output=tmp_path / "out", push_to_hub="me/pt")
    error = refused(export_checkpoint.main, [str(weights), *flags], capsys)
    assert "the hub does not take it" in error
    assert (tmp_path / "out/model.safetensors").exists()
