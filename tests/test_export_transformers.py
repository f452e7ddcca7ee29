"""What transformers computes with exported weights, in a process of its own: the same
logits and features; and the weights come back from it bit for bit.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_values import close, mask
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_exports import CLASSIFIERS, CLOSE, HEADS, assert_same, classifier, export, inputs, pretraining, save

from checkpoint_io import remapping
from data_pipeline.image_formats import load_image
from transforms import IMAGENET_MEAN, IMAGENET_STD, eval_view

PICTURE = torch.randint(0, 256, (73, 90, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def jobs_in(folder: Path) -> dict[str, dict]:
    jobs = {case: ("BeitForImageClassification", classifier(case)) for case in CLASSIFIERS}
    jobs["features"] = ("BeitModel", classifier("mean"))
    jobs["codes"] = ("BeitForMaskedImageModeling", pretraining())
    jobs["tokens"] = ("BeitModel", pretraining())
    described = {}
    for case, (name, model) in jobs.items():
        there = folder / case
        source = save(model, there / "source.pth", stage={"classes": [f"class {n}" for n in range(10)]})
        export(source, "huggingface", there / "hf", "--architecture", name, *HEADS)
        given = {"images": inputs()} | ({"mask": mask(2, 4, 6, 1).to(torch.uint8)} if case == "codes" else {})
        save_file(given, there / "inputs.safetensors")
        parts = {key: f"{there}/{key}.safetensors" for key in ("inputs", "outputs", "modules")}
        described[case] = {
            "folder": f"{there}/hf",
            "class": name,
            **parts,
            "saved": f"{there}/saved",
            "model": model,
        }
    Image.fromarray(PICTURE.numpy()).save(folder / "picture.png")
    described["mean"]["picture"] = f"{folder}/picture.png"
    return described


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    """Every job's folder, our model, what transformers computed, and what it said while
    loading.
    """
    folder = tmp_path_factory.mktemp("huggingface")
    jobs = jobs_in(folder)
    plain = [{key: value for key, value in job.items() if key != "model"} for job in jobs.values()]
    (folder / "jobs.json").write_text(json.dumps(plain))
    script = Path(__file__).with_name("huggingface_side.py")
    command = [sys.executable, str(script), str(folder / "jobs.json"), str(folder / "said.json")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for job, said in zip(jobs.values(), json.loads((folder / "said.json").read_text()), strict=True):
        job |= {"said": said, "found": load_file(job["outputs"])}
    return jobs


@pytest.mark.slow
def test_transformers_finds_every_key_and_no_other(huggingface):
    for case, job in huggingface.items():
        problems = {key: value for key, value in job["said"].items() if key.endswith("_keys") and value}
        assert problems == {}, case


@pytest.mark.slow
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_transformers_computes_the_same_logits(case, huggingface):
    with torch.no_grad():
        close(huggingface[case]["found"]["logits"], huggingface[case]["model"](inputs()), CLOSE)


@pytest.mark.slow
def test_transformers_computes_the_same_features(huggingface):
    job = huggingface["features"]
    with torch.no_grad():
        close(job["found"]["pooler_output"], job["model"].forward_features(inputs()), CLOSE)
        close(job["found"]["last_hidden_state"], job["model"].get_intermediate_layers(inputs())[-1], CLOSE)
        job = huggingface["tokens"]
        close(
            job["found"]["last_hidden_state"][:, 1:],
            job["model"](inputs(), return_patch_tokens=True)[0],
            CLOSE,
        )


@pytest.mark.slow
def test_transformers_predicts_the_same_codes(huggingface):
    job = huggingface["codes"]
    with torch.no_grad():
        close(
            job["found"]["logits"], job["model"](inputs(), mask(2, 4, 6, 1), return_all_tokens=True)[0], CLOSE
        )


@pytest.mark.slow
def test_transformers_sees_the_image_as_our_evaluation_does(huggingface, tmp_path):
    Image.fromarray(PICTURE.numpy()).save(tmp_path / "picture.png")
    ours = eval_view(64, mean=IMAGENET_MEAN, std=IMAGENET_STD)(load_image(str(tmp_path / "picture.png")))[
        "image"
    ]
    for processor in ("AutoImageProcessor", "BeitImageProcessor"):
        close(huggingface["mean"]["found"][processor][0], ours, CLOSE)
    assert huggingface["mean"]["said"]["id2label"]["3"] == "class 3"


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CLASSIFIERS, "codes", "tokens", "features"])
def test_weights_come_back_from_hugging_face_bit_for_bit(case, huggingface, tmp_path):
    """From our own folder, from one that transformers saved, and from the names that
    its modules have now.
    """
    job = huggingface[case]
    mine = job["model"].state_dict()
    lost = {"codes": ("cls_pt",), "tokens": ("cls_pt", "lm_head", "mask_token"), "features": ("head",)}.get(
        case, ()
    )
    mine = {key: value for key, value in mine.items() if not key.startswith(lost)}
    if case == "plain":  # query and value have a bias there: zeros
        zeros = torch.zeros(48)
        mine |= {f"blocks.{block}.attn.{name}_bias": zeros for block in range(4) for name in "qv"}
    for folder in (job["folder"], job["saved"]):
        assert_same(load_file(export(folder, "safetensors", tmp_path / "back.safetensors")), mine)
    converted = remapping.to_our_names(load_file(job["modules"]))
    assert all(
        torch.equal(converted[key], value)
        for key, value in mine.items()
        if not key.endswith("relative_position_index")
    )


@pytest.mark.slow
def test_imported_weights_bring_flags_and_class_names(huggingface, tmp_path):
    path = export(huggingface["mean"]["saved"], "safetensors", tmp_path / "back.pth")
    content = torch.load(path, weights_only=True)
    assert content["args"]["model"] is None  # 48 channels: no size of ours
    expected = {
        "input_size": 64,
        "nb_classes": 10,
        "use_mean_pooling": True,
        "rel_pos_bias": True,
        "abs_pos_emb": False,
    }
    assert {key: content["args"][key] for key in expected} == expected
    assert content["args"]["imagenet_default_mean_and_std"] is False  # transformers saved no preprocessor
    assert content["stage"]["classes"][3] == "class 3"
    again = export(path, "huggingface", tmp_path / "hf")
    assert json.loads((again / "config.json").read_text())["id2label"]["3"] == "class 3"
