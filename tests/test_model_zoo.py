"""The table of published models: names, files, builders, results, and what is on this
disk.
"""

from __future__ import annotations

import pathlib

import pytest
import torch
from refusals import refused

import model_zoo
import modeling_dvae
import modeling_finetune
import modeling_pretrain
import modeling_vqkd
from checkpoint_io import published

pytestmark = pytest.mark.usefixtures("hub")


def test_table_names_files_builders_and_results() -> None:
    entry = published.ENTRIES["beitv2_base_patch16_224_pt1k"]
    assert entry.urls == [published.MIRRORS[0] + "BEiT-v2/beitv2_base_patch16_224_pt1k.pth"]
    assert (entry.kind, entry.model) == ("pretrained", "beit_base_patch16_224_8k_vocab_cls_pt")
    entry = published.ENTRIES["beit_base_patch16_384_pt22k_ft22kto1k"]
    assert (entry.file, entry.model) == (
        "v1.0/beit_base_patch16_384_pt22k_ft22kto1k.pth",
        "beit_base_patch16_384",
    )
    assert (entry.classes, dict(entry.metrics)) == (1000, {"top1": 86.82, "top5": 98.124, "loss": 0.565})
    entry = published.ENTRIES["vqkd_encoder_base_decoder_3x768x12_clip"]
    assert entry.urls[0].endswith("/BEiT-v2/vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth")
    assert entry.sha256_prefix == "d5036aa7"
    assert len(published.ENTRIES) == 30


def test_main_prints_the_table_and_knows_its_names(capsys: pytest.CaptureFixture[str]) -> None:
    model_zoo.main([])
    out = capsys.readouterr().out
    assert "top1 85.5" in out
    assert all(name in out for name in published.ENTRIES)
    assert "beitv2_base_patch16_224_pt1k" in refused(model_zoo.main, ["beitv2_base_patch16_224_pt1"], capsys)


def test_the_table_shows_what_is_on_this_disk(hub: pathlib.Path) -> None:
    hub.mkdir(parents=True)
    (hub / "beit_base_patch16_224_pt22k.pth").write_bytes(bytes(3 * 2**20))
    row = next(
        line for line in model_zoo.format_table().splitlines() if "beit_base_patch16_224_pt22k " in line
    )
    assert row.split() == ["beit_base_patch16_224_pt22k", "92.0", "M", "~351", "MiB", "3", "MiB", "-"]


def test_the_table_shows_about_how_much_is_downloaded() -> None:
    rows = {line.split()[0]: line for line in model_zoo.format_table().splitlines() if line.startswith("  ")}
    assert " ~330 MiB " in rows["beitv2_base_patch16_224_pt1k_ft1k"]  # 86.5 M x 4 bytes
    assert " ~205 MiB " in rows["dall_e_encoder"]  # as OpenAI's file is
    assert " ~1.1 GiB " in rows["beitv2_large_patch16_224_pt1k_ft1k"]
    assert "~" not in rows["beitv2_base_patch16_224_pt1k_ftade20k"]


@pytest.mark.slow
def test_the_parameter_counts_are_those_of_the_models() -> None:
    positions = {"use_abs_pos_emb": False, "init_values": 0.1}
    for name, entry in published.ENTRIES.items():
        with torch.device("meta"):
            if entry.kind == "tokenizer":
                model = modeling_vqkd.create_model(name, as_tokenizer=True)
            elif entry.kind == "pretrained":
                layers = {"early_layers": 9 if "base" in name else 21}
                model = modeling_pretrain.create_model(
                    entry.model, use_shared_rel_pos_bias=True, **positions, **layers
                )
            elif entry.kind == "tokenizer-v1":
                model = modeling_dvae.DallEEncoder()
            elif entry.kind in ("intermediate", "finetuned"):
                own = {"use_rel_pos_bias": True, "num_classes": entry.classes}
                model = modeling_finetune.create_model(entry.model, **positions, **own)
            else:
                continue
        assert entry.params == round(sum(p.numel() for p in model.parameters()) / 1e6, 1), name
