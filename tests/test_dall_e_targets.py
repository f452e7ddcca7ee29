"""Pretraining on the codes of DALL-E's tokenizer (BEiT v1)."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from tiny_pretraining import NOWHERE, PLAIN, pixel_flags, spy_on_steps
from tiny_runs import as_flags, assert_same_weights, log_lines

import modeling_dvae
import run_beitv2_pretraining
from flags.pretraining import parse_flags


@pytest.fixture(scope="module")
def dvae(tmp_path_factory):
    """DALL-E's encoder, tiny, 16 codes, as a state dict."""
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("dvae") / "encoder.pth"
    torch.save(modeling_dvae.DallEEncoder(n_hid=8, n_blk_per_group=1, vocab_size=16).state_dict(), path)
    return path


def dall_e_flags(data, out, dvae, *more):
    """No --second_input_size: 16 pixels for the 2 x 2 grid."""
    codes = as_flags(target="tokens", tokenizer_model="dall-e", tokenizer_weight=dvae, codebook_size=16)
    return [*pixel_flags(data, out, *PLAIN), *codes, *more]


@pytest.mark.parametrize("name", ["dall-e", "dall_e"])
def test_dall_e_end_to_end(name, data, dvae, tmp_path, monkeypatch):
    seen = spy_on_steps(monkeypatch)
    more = [
        "--tokenizer_model",
        name,
        *as_flags(second_interpolation="lanczos", image_freq=1, eval_data_path=data),
    ]
    run_beitv2_pretraining.main(dall_e_flags(data, tmp_path, dvae, *more))
    _, batch, outputs, loss, _ = seen[0]
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["tokenizer_image"].shape == (4, 3, 16, 16)
    encoder = modeling_dvae.load_dall_e_encoder(str(dvae))
    targets = encoder.get_codebook_indices(batch["tokenizer_image"])[batch["mask"]]
    assert loss == pytest.approx(float(F.cross_entropy(outputs[0], targets)))
    lines = log_lines(tmp_path)
    assert {"train_mlm_acc", "train_majority_code_share", "test_mlm_acc"} <= lines[0].keys()
    assert (tmp_path / "pictures/masked_tokens-0000.png").exists()


def test_names_of_v1s_tokenizer_act(data, dvae, tmp_path, capsys):
    """--discrete_vae_weight_path: the published folder, or the file in it."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name in ("encoder.pkl", "decoder.pkl"):
        shutil.copy(dvae, folder / name)
    plain = [*pixel_flags(data, "", *PLAIN), "--target", "tokens"]
    for words in ([f"--discrete_vae_weight_path={folder}"], ["--discrete_vae_type", "dall-e"]):
        args = parse_flags([*plain, *words])
        assert (args.tokenizer_model, args.second_interpolation) == ("dall-e", "lanczos")
        weight = str(folder / "encoder.pkl") if "=" in words[0] else None  # None: OpenAI's
        assert args.tokenizer_weight == weight
        path = tmp_path / "flags.json"
        path.write_text(json.dumps(args.to_config()))
        assert parse_flags(["--config", str(path)]).plain() == args.plain()
    file = ["--discrete_vae_weight_path", str(folder / "encoder.pkl")]
    bicubic = parse_flags([*plain, *file, "--second_interpolation", "bicubic"])
    assert (bicubic.tokenizer_weight, bicubic.second_interpolation) == (file[1], "bicubic")
    out = tmp_path / "out"
    run_beitv2_pretraining.main([*plain, *as_flags(codebook_size=16, epochs=1, output_dir=out), *file])
    by_new_names = dall_e_flags(data, tmp_path / "new", dvae, "--second_interpolation", "lanczos")
    run_beitv2_pretraining.main([*by_new_names, "--epochs", "1"])
    assert_same_weights(out / "checkpoint.pth", tmp_path / "new/checkpoint.pth")
    for more, sentence in (
        (["--discrete_vae_weight_path", str(data)], "holds no encoder.pkl: `python model_zoo.py dall_e"),
        (["--discrete_vae_type", "customized"], "no weights of such a tokenizer were published"),
        ([*file, "--tokenizer_model", "dall-e"], "and --tokenizer_model all name a tokenizer"),
    ):
        assert sentence in refused(run_beitv2_pretraining.main, [*plain, *more], capsys)


def test_dall_e_refuses_another_codebook_and_another_grid(data, dvae, tmp_path, capsys):
    for more, sentence in (
        (["--codebook_size", "32"], f"the dVAE in {dvae} has 16 codes, not 32: pass --codebook_size 16"),
        (
            ["--second_input_size", "32"],
            "--second_input_size 32 gives the tokenizer another grid than the model's 2 x 2: use 16",
        ),
        (["--tokenizer_model", "dalle"], "unknown tokenizer 'dalle'; did you mean dall_e or dall-e?"),
    ):
        assert sentence in refused(
            run_beitv2_pretraining.main, dall_e_flags(data, tmp_path, dvae, *more), capsys
        )


@pytest.mark.parametrize(
    ("model", "view"),
    [
        ("base_patch16_224", 112),
        ("base_patch16_256", 128),
        ("huge_patch14_224", 128),
        ("giant_patch14_224", 128),
    ],
)
def test_the_views_of_both_tokenizers_follow_the_grid(model, view, capsys):
    size = model.split("_")[-1]
    flags = ["--model", f"beit_{model}_8k_vocab", "--input_size", size, "--second_input_size", "24"]
    assert f"use {view}, or leave it out" in refused(
        run_beitv2_pretraining.main, [*NOWHERE, *flags, "--tokenizer_model", "dall-e"], capsys
    )
    assert f"use {2 * view}, or leave it out" in refused(
        run_beitv2_pretraining.main, [*NOWHERE, *flags], capsys
    )
