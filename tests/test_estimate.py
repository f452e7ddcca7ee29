"""estimate.py: what a published run will need, beside figures that are known, and that
what it cannot estimate is refused in a sentence.
"""

import json

import pytest
from refusals import refused

import estimate

BASE = """run_beitv2_pretraining.py --model beit_base_patch16_224_8k_vocab_cls_pt --num_mask_patches 75
    --tokenizer_model vqkd_encoder_base_decoder_3x768x12_clip --tokenizer_weight none.pth --batch_size 128
    --amp_dtype fp16 --gpus 16 --gpu V100-32GB --images 1281167 --epochs 300""".split()
DEMO = """run_beitv2_pretraining.py --model beit_demo_patch16_128_8k_vocab_cls_pt --input_size 128
    --second_input_size 128 --tokenizer_model vqkd_encoder_demo_decoder_1x128x4_hog --early_layers 4
    --head_layers 1 --batch_size 8 --gpus 2 --images 1000""".split()
KEYS = {
    "parameters",
    "peak_bytes",
    "peak_by_kind",
    "fits",
    "largest_batch_size",
    "gflop_per_image",
    "exchanged_bytes_per_step",
    "images_per_second",
    "hours",
    "price",
    "disk_bytes",
}


def estimated(flags, tmp_path):
    estimate.main([*flags, "--output", str(tmp_path / "estimate.json")])
    return json.loads((tmp_path / "estimate.json").read_text())


@pytest.mark.slow
def test_the_published_base_run(tmp_path, capsys):
    found = estimated(BASE, tmp_path)
    assert found["parameters"] == pytest.approx(106.1e6, rel=1e-3)
    assert found["exchanged_bytes_per_step"] == 4 * found["parameters"]
    assert found["peak_bytes"] / 2**30 == pytest.approx(12.2, rel=0.1)
    assert found["gflop_per_image"] == pytest.approx(153.7, rel=0.02)
    assert found["fits"]
    assert "it fits" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_run_has_all_keys(tmp_path):
    found = estimated(DEMO, tmp_path)
    assert found.keys() >= KEYS
    assert sum(found["peak_by_kind"].values()) == pytest.approx(found["peak_bytes"], rel=0.01)


@pytest.mark.parametrize(
    "flags",
    [["--gpu", "abacus"], ["--gpus", "0"], ["--data_set", "no such"]],
    ids=["card", "none", "entry's"],
)
def test_what_cannot_be_estimated_is_refused(flags, capsys):
    assert flags[1] in refused(estimate.main, [*DEMO, *flags], capsys)


def test_other_scripts_are_refused(capsys):
    assert "model_zoo.py" in refused(estimate.main, ["model_zoo.py"], capsys)
