"""Images to codes: the right code for the right file, whatever breaks."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from many_processes import two_processes
from PIL import Image
from refusals import refused
from tiny_runs import encoded_names, encoding_flags, photos

import arguments
import encode_images
import modeling_vqkd
import visualize_codebook
from data_pipeline.image_formats import load_image
from data_pipeline.image_lists import find_images
from modeling_dvae import DallEEncoder
from modeling_vqkd import VQKD
from runtime import distributed
from transforms import eval_view
from visualization import code_files, drawing


@pytest.fixture
def broken(tmp_path):
    """Photos among which the first, one in the middle, two in a row and the last cannot
    be read.
    """
    folder = photos(tmp_path / "broken", per_class=5)
    for name in ("a/0.jpg", "a/3.jpg", "b/1.jpg", "b/2.jpg", "b/4.jpg"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2] if name == "a/3.jpg" else b"no image")
    return folder


def expected(weights, data):
    """{name: codes}, one image at a time."""
    model, view = modeling_vqkd.open_tokenizer(str(weights))[0], eval_view(32)
    codes = {}
    for path, _ in find_images(str(data))[0]:
        try:
            image = view(load_image(path))["image"]
        except Exception:
            continue
        codes[os.path.relpath(path, data)] = model.get_codebook_indices(image[None])[0].tolist()
    return codes


# ── Codes ──


def test_every_image_has_the_codes_of_the_evaluation_view(ten_photos, tokenizer_weight, tmp_path, capsys):
    encode_images.main(encoding_flags(tokenizer_weight, ten_photos, tmp_path))
    codes, want = np.load(tmp_path / "codes.npy"), expected(tokenizer_weight, ten_photos)
    assert codes.shape == (10, 4) and codes.dtype == np.uint16
    assert len({tuple(row) for row in codes.tolist()}) > 1  # else the order could not be told
    assert encoded_names(tmp_path) == list(want) == sorted(want)
    assert dict(zip(encoded_names(tmp_path), codes.tolist(), strict=True)) == want
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["view"] == "shorter side to 32 pixels (bicubic), then the central 32 x 32"
    assert (about["images"], about["skipped"], about["n_codes"], about["grid"]) == (10, 0, 16, [2, 2])
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    assert about["codes_used"] == len(shares)
    assert about["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=0.01)
    assert "10 images" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["npy", "jsonl"])
def test_what_cannot_be_read_is_named_and_moves_nothing(form, broken, tokenizer_weight, tmp_path, capsys):
    out = tmp_path / "out"
    encode_images.main(encoding_flags(tokenizer_weight, broken, out, "--format", form))
    want = expected(tokenizer_weight, broken)
    assert list(want) == ["a/1.jpg", "a/2.jpg", "a/4.jpg", "b/0.jpg", "b/3.jpg"]
    assert encoded_names(out) == list(want)
    if form == "npy":
        assert dict(zip(encoded_names(out), np.load(out / "codes.npy").tolist(), strict=True)) == want
    else:
        lines = [json.loads(line) for line in (out / "codes.jsonl").read_text().splitlines()]
        assert [line["file"] for line in lines] == list(want)
        assert all(np.shape(line["codes"]) == (2, 2) for line in lines)
        assert {line["file"]: [*line["codes"][0], *line["codes"][1]] for line in lines} == want
    skipped = (out / "skipped.txt").read_text().splitlines()
    assert [line.split(" (")[0] for line in skipped] == [
        str(broken / name) for name in ("a/0.jpg", "a/3.jpg", "b/1.jpg", "b/2.jpg", "b/4.jpg")
    ]
    assert all("(" in line for line in skipped)
    assert "skipped    5 files" in capsys.readouterr().out
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(broken, tokenizer_weight, tmp_path):
    encode_images.main(encoding_flags(tokenizer_weight, broken, tmp_path / "one"))
    two_processes("encode_images.py", encoding_flags(tokenizer_weight, broken, tmp_path / "two"))
    for name in ("codes.npy", "files.txt", "skipped.txt", "about.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert not list((tmp_path / "two").glob(".*"))


def test_every_number_of_processes_shares_all_images_in_order(ten_photos, tokenizer_weight, tmp_path):
    """Also when some have nothing to do."""
    args = arguments.parse(encode_images.get_parser(), encoding_flags(tokenizer_weight, ten_photos, tmp_path))
    encoder, files = encode_images.load_tokenizer(args), encode_images.files_to_encode(str(ten_photos))
    for world_size in (1, 3, 12):
        names = []
        for rank in range(world_size):
            launch = distributed.Launch(rank, world_size)
            share = encode_images.encode_share(
                args, files, encoder, eval_view(32), launch, torch.device("cpu")
            )
            names += [name for _, batch, _ in share for name in batch]
        assert [str(ten_photos / name) for name in names] == files


def test_a_run_that_breaks_off_leaves_the_old_results_or_none(
    ten_photos, tokenizer_weight, tmp_path, monkeypatch
):
    original, calls = VQKD.get_codebook_indices, []

    def interrupted(self, x):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, x)

    monkeypatch.setattr(VQKD, "get_codebook_indices", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_images.main(encoding_flags(tokenizer_weight, ten_photos, tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    encode_images.main(encoding_flags(tokenizer_weight, ten_photos, tmp_path, "--format", "jsonl"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls.clear()
    monkeypatch.setattr(VQKD, "get_codebook_indices", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_images.main(encoding_flags(tokenizer_weight, ten_photos, tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    # one encoding per folder: the other form's codes go
    encode_images.main(encoding_flags(tokenizer_weight, ten_photos / "a", tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        "codes.npy",
        "files.txt",
        "skipped.txt",
        "about.json",
        "flags.json",
    }


def test_the_other_parts_of_a_killed_run_are_not_joined(ten_photos, tokenizer_weight, tmp_path):
    for kind in ("codes", "files"):
        (tmp_path / f".{kind}.1.part").write_bytes(b"12345678")
    (tmp_path / ".checkpoint.pth.77.part").write_bytes(b"another program's")
    encode_images.main(encoding_flags(tokenizer_weight, ten_photos, tmp_path))
    assert len(np.load(tmp_path / "codes.npy")) == 10
    assert [path.name for path in tmp_path.glob(".*")] == [".checkpoint.pth.77.part"]


def test_odd_names_keep_their_lines(tokenizer_weight, tmp_path):
    folder = photos(tmp_path / "data", per_class=2, classes="a")
    (folder / "a/0.jpg").rename(folder / "a/new\nline.jpg")
    (folder / "a/1.jpg").rename(os.fsdecode(os.path.join(os.fsencode(folder), b"a/\xff \xe9.jpg")))
    with open(os.path.join(os.fsencode(folder), b"a/\xff.jpg"), "wb"):
        pass  # cannot be read, and its name cannot be printed
    encode_images.main(encoding_flags(tokenizer_weight, folder, tmp_path / "out", "--maps", "1"))
    assert (tmp_path / "out/files.txt").read_bytes() == b"a/\xff \xe9.jpg\n"
    assert len(np.load(tmp_path / "out/codes.npy")) == 1
    visualize_codebook.main(["--encoded", str(tmp_path / "out"), "--output", str(tmp_path / "page.html")])


def test_codes_beyond_16_bits_are_kept(tmp_path):
    parts = code_files.Parts(tmp_path, 1, 70_000, (1, 2))
    with code_files.share_writer(parts, 0) as add:
        add(torch.tensor([[65_999, 69_999]]), ["x.jpg"], [])
    code_files.join_parts(parts, "npy", {})
    codes = np.load(tmp_path / "codes.npy")
    assert codes.tolist() == [[65_999, 69_999]] and codes.dtype == np.int32


def test_dall_e_tokens(ten_photos, tmp_path):
    torch.manual_seed(0)
    model = DallEEncoder(n_hid=64, n_blk_per_group=1, vocab_size=512)
    torch.save(model.state_dict(), tmp_path / "encoder.pth")
    more = ["--tokenizer_model", "dall-e", "--input_size", "32"]
    encode_images.main(encoding_flags(tmp_path / "encoder.pth", ten_photos, tmp_path / "out", *more))
    codes = np.load(tmp_path / "out/codes.npy")
    image = eval_view(32)(load_image(str(ten_photos / "b/4.jpg")))["image"]
    assert codes.shape == (10, 16)
    assert codes[-1].tolist() == model.get_codebook_indices(image[None])[0].tolist()


def test_token_maps_show_the_image_above_its_codes(ten_photos, tokenizer_weight, tmp_path, monkeypatch):
    monkeypatch.setattr(code_files, "SHEET", 2)
    encode_images.main(encoding_flags(tokenizer_weight, ten_photos, tmp_path, "--maps", "3"))
    assert {path.name for path in tmp_path.glob("*.png")} == {"token_maps-0.png", "token_maps-1.png"}
    picture = np.asarray(Image.open(tmp_path / "token_maps-1.png").convert("RGB")) / 255
    codes = torch.from_numpy(np.load(tmp_path / "codes.npy")[2].astype(int)).view(2, 2)
    want = drawing.token_map(codes, 16, (160, 160)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(picture[-160:, :160], want, atol=0.01)
    encode_images.main(encoding_flags(tokenizer_weight, ten_photos, tmp_path))
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data_path", "/nowhere"], "--data_path /nowhere: no such folder"),
        (["--input_size", "64"], "trained on 32 pixels"),
        (["--tokenizer_weight", ""], "--tokenizer_weight is missing"),
        (["--tokenizer_model", "dall-e"], "is not DALL-E's encoder"),
        (["--crop_pct", "2"], "--crop_pct: '2' is not a number from 0.05 to 1"),
        (["--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere"),
    ],
)
def test_a_users_mistake_is_one_line(more, message, ten_photos, tokenizer_weight, tmp_path, capsys):
    assert message in refused(
        encode_images.main, encoding_flags(tokenizer_weight, ten_photos, tmp_path, *more), capsys
    )


def test_a_folder_of_broken_files_is_refused_and_old_codes_stay(
    ten_photos, tokenizer_weight, tmp_path, capsys
):
    encode_images.main(encoding_flags(tokenizer_weight, ten_photos, tmp_path / "out"))
    (tmp_path / "x.jpg").write_bytes(b"no image")
    assert "no image could be read" in refused(
        encode_images.main, encoding_flags(tokenizer_weight, tmp_path / "x.jpg", tmp_path / "out"), capsys
    )
    assert len(np.load(tmp_path / "out/codes.npy")) == 10 == len(encoded_names(tmp_path / "out"))


def test_token_maps_leave_out_what_has_gone_since(
    ten_photos, tokenizer_weight, tmp_path, monkeypatch, capsys
):
    images, join = shutil.copytree(ten_photos, tmp_path / "images"), encode_images.join_shares
    monkeypatch.setattr(
        encode_images, "join_shares", lambda *args: (join(*args), (images / "a/0.jpg").unlink())
    )
    encode_images.main(encoding_flags(tokenizer_weight, images, tmp_path / "out", "--maps", "3"))
    assert "a/0.jpg" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "out/token_maps-0.png").convert("RGB")) / 255
    codes = torch.from_numpy(np.load(tmp_path / "out/codes.npy")[1].astype(int)).view(2, 2)
    want = drawing.token_map(codes, 16, (160, 160)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(picture[-160:, :160], want, atol=0.01)
    assert picture.shape[1] == 3 * 160 + 2 * drawing.GAP
