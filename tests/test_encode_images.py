"""Images to codes: the right code for the right file, whatever breaks; and the page that
shows what the codes stand for.
"""

import base64
import html.parser
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from many_processes import two_processes
from PIL import Image
from refusals import refused
from tiny_runs import as_flags, photos, tokenizer

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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("photos"), per_class=5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.pth")


@pytest.fixture
def broken(tmp_path):
    """Photos among which the first, one in the middle, two in a row and the last cannot be read."""
    folder = photos(tmp_path / "broken", per_class=5)
    for name in ("a/0.jpg", "a/3.jpg", "b/1.jpg", "b/2.jpg", "b/4.jpg"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2] if name == "a/3.jpg" else b"no image")
    return folder


def flags(weights, data, out, *more):
    fixed = as_flags(batch_size=3, num_workers=0, device="cpu")
    return [*as_flags(tokenizer_weight=weights, data_path=data, output_dir=out), *fixed, *more]


def names_in(out):
    return (out / "files.txt").read_text().splitlines()


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


def test_every_image_has_the_codes_of_the_evaluation_view(data, weights, tmp_path, capsys):
    encode_images.main(flags(weights, data, tmp_path))
    codes, want = np.load(tmp_path / "codes.npy"), expected(weights, data)
    assert codes.shape == (10, 4) and codes.dtype == np.uint16
    assert len({tuple(row) for row in codes.tolist()}) > 1  # else the order could not be told
    assert names_in(tmp_path) == list(want) == sorted(want)
    assert dict(zip(names_in(tmp_path), codes.tolist(), strict=True)) == want
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["view"] == "shorter side to 32 pixels (bicubic), then the central 32 x 32"
    assert (about["images"], about["skipped"], about["n_codes"], about["grid"]) == (10, 0, 16, [2, 2])
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    assert about["codes_used"] == len(shares)
    assert about["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=0.01)
    assert "10 images" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["npy", "jsonl"])
def test_what_cannot_be_read_is_named_and_moves_nothing(form, broken, weights, tmp_path, capsys):
    out = tmp_path / "out"
    encode_images.main(flags(weights, broken, out, "--format", form))
    want = expected(weights, broken)
    assert list(want) == ["a/1.jpg", "a/2.jpg", "a/4.jpg", "b/0.jpg", "b/3.jpg"]
    assert names_in(out) == list(want)
    if form == "npy":
        assert dict(zip(names_in(out), np.load(out / "codes.npy").tolist(), strict=True)) == want
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
def test_two_processes_write_what_one_writes(broken, weights, tmp_path):
    encode_images.main(flags(weights, broken, tmp_path / "one"))
    two_processes("encode_images.py", flags(weights, broken, tmp_path / "two"))
    for name in ("codes.npy", "files.txt", "skipped.txt", "about.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert not list((tmp_path / "two").glob(".*"))


def test_every_number_of_processes_shares_all_images_in_order(data, weights, tmp_path):
    """Also when some have nothing to do."""
    args = arguments.parse(encode_images.get_parser(), flags(weights, data, tmp_path))
    encoder, files = encode_images.load_tokenizer(args), encode_images.files_to_encode(str(data))
    for world_size in (1, 3, 12):
        names = []
        for rank in range(world_size):
            launch = distributed.Launch(rank, world_size)
            share = encode_images.encode_share(
                args, files, encoder, eval_view(32), launch, torch.device("cpu")
            )
            names += [name for _, batch, _ in share for name in batch]
        assert [str(data / name) for name in names] == files


def test_a_run_that_breaks_off_leaves_the_old_results_or_none(data, weights, tmp_path, monkeypatch):
    original, calls = VQKD.get_codebook_indices, []

    def interrupted(self, x):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, x)

    monkeypatch.setattr(VQKD, "get_codebook_indices", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_images.main(flags(weights, data, tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    encode_images.main(flags(weights, data, tmp_path, "--format", "jsonl"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls.clear()
    monkeypatch.setattr(VQKD, "get_codebook_indices", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_images.main(flags(weights, data, tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    # one encoding a folder: the other form's codes go
    encode_images.main(flags(weights, data / "a", tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        "codes.npy",
        "files.txt",
        "skipped.txt",
        "about.json",
    }


def test_the_other_parts_of_a_killed_run_are_not_joined(data, weights, tmp_path):
    for kind in ("codes", "files"):
        (tmp_path / f".{kind}.1.part").write_bytes(b"12345678")
    (tmp_path / ".checkpoint.pth.77.part").write_bytes(b"another program's")
    encode_images.main(flags(weights, data, tmp_path))
    assert len(np.load(tmp_path / "codes.npy")) == 10
    assert [path.name for path in tmp_path.glob(".*")] == [".checkpoint.pth.77.part"]


def test_odd_names_keep_their_lines(weights, tmp_path):
    folder = photos(tmp_path / "data", per_class=2, classes="a")
    (folder / "a/0.jpg").rename(folder / "a/new\nline.jpg")
    (folder / "a/1.jpg").rename(os.fsdecode(os.path.join(os.fsencode(folder), b"a/\xff \xe9.jpg")))
    with open(os.path.join(os.fsencode(folder), b"a/\xff.jpg"), "wb"):
        pass  # cannot be read, and its name cannot be printed
    encode_images.main(flags(weights, folder, tmp_path / "out", "--maps", "1"))
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


def test_dall_e_tokens(data, tmp_path):
    torch.manual_seed(0)
    model = DallEEncoder(n_hid=64, n_blk_per_group=1, vocab_size=512)
    torch.save(model.state_dict(), tmp_path / "encoder.pth")
    more = ["--tokenizer_model", "dall-e", "--input_size", "32"]
    encode_images.main(flags(tmp_path / "encoder.pth", data, tmp_path / "out", *more))
    codes = np.load(tmp_path / "out/codes.npy")
    image = eval_view(32)(load_image(str(data / "b/4.jpg")))["image"]
    assert codes.shape == (10, 16)
    assert codes[-1].tolist() == model.get_codebook_indices(image[None])[0].tolist()


def test_token_maps_show_the_image_above_its_codes(data, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_images, "SHEET", 2)
    encode_images.main(flags(weights, data, tmp_path, "--maps", "3"))
    assert {path.name for path in tmp_path.glob("*.png")} == {"token_maps-0.png", "token_maps-1.png"}
    picture = np.asarray(Image.open(tmp_path / "token_maps-1.png").convert("RGB")) / 255
    codes = torch.from_numpy(np.load(tmp_path / "codes.npy")[2].astype(int)).view(2, 2)
    want = drawing.token_map(codes, 16, (160, 160)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(picture[-160:, :160], want, atol=0.01)
    encode_images.main(flags(weights, data, tmp_path))
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
def test_a_users_mistake_is_one_line(more, message, data, weights, tmp_path, capsys):
    assert message in refused(encode_images.main, flags(weights, data, tmp_path, *more), capsys)


def test_a_folder_of_broken_files_is_refused_and_old_codes_stay(data, weights, tmp_path, capsys):
    encode_images.main(flags(weights, data, tmp_path / "out"))
    (tmp_path / "x.jpg").write_bytes(b"no image")
    assert "no image could be read" in refused(
        encode_images.main, flags(weights, tmp_path / "x.jpg", tmp_path / "out"), capsys
    )
    assert len(np.load(tmp_path / "out/codes.npy")) == 10 == len(names_in(tmp_path / "out"))


# ── The page ──


class Page(html.parser.HTMLParser):
    """The sections' pictures; fails on tags that are not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.section, self.pictures, self.links = [], None, {}, []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.section = attributes["id"] if tag == "section" else self.section
        if tag == "section":
            self.pictures[self.section] = []
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            kind, data = re.fullmatch(r"data:image/(jpeg|png);base64,(.*)", attributes["src"]).groups()
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            assert image.format.lower() == kind
            assert image.size == (int(attributes["width"]), int(attributes["height"]))
            self.pictures.setdefault(self.section, []).append(attributes["alt"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def encoded(data, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded")
    encode_images.main(flags(weights, data, out))
    return out


@pytest.fixture(scope="module")
def invented(encoded, tmp_path_factory):
    """The same images with codes 0 to 5 at random."""
    out = shutil.copytree(encoded, tmp_path_factory.mktemp("invented") / "codes")
    np.save(out / "codes.npy", np.random.RandomState(0).randint(0, 6, (10, 4)).astype(np.uint16))
    return out


def page(encoded, path, *more):
    visualize_codebook.main(["--encoded", str(encoded), "--output", str(path), *more])
    return Page(path)


def test_the_page_shows_patches_of_the_code_and_stands_alone(invented, tmp_path):
    codes, names = np.load(invented / "codes.npy"), names_in(invented)
    counts = np.bincount(codes.ravel(), minlength=16)
    unused = int(np.flatnonzero(counts == 0)[0])
    ranked = np.argsort(-counts, kind="stable")
    chosen = [int(ranked[1]), unused, int(ranked[0])]
    found = page(invented, tmp_path / "page.html", "--codes", *map(str, chosen), "--examples", "8")
    # None: the histogram before them
    assert list(found.pictures) == [None, *(f"code-{code}" for code in chosen)]
    assert len(found.pictures[None]) == 1
    assert found.pictures[f"code-{unused}"] == []
    assert "Does not occur in these images" in found.text
    for code in (chosen[0], chosen[2]):
        assert len(found.pictures[f"code-{code}"]) == min(8, counts[code])
        images = []
        for alt in found.pictures[f"code-{code}"]:
            shown, row, column, name = re.fullmatch(r"code (\d+): patch (\d+),(\d+) of (.*)", alt).groups()
            assert int(shown) == code == codes[names.index(name)].reshape(2, 2)[int(row), int(column)]
            images.append(name)
        have = sum((row == code).any() for row in codes)
        assert len(set(images)) == min(len(images), have)
        assert (
            f"{counts[code]} patches, {counts[code] / counts.sum():.2%} of all, in {have} images"
            in found.text
        )
    assert all(link.startswith("data:") for link in found.links)


def test_the_examples_are_those_of_the_seed(encoded, tmp_path):
    first, again, other = (
        page(encoded, tmp_path / f"{number}.html", "--top", "2", "--examples", "2", "--seed", seed).text
        for number, seed in enumerate("001")
    )
    assert first == again != other


def test_names_are_escaped(weights, tmp_path):
    folder = photos(tmp_path / "data", per_class=1, classes="a")
    (folder / "a/0.jpg").rename(folder / 'a/"><script>.jpg')
    encode_images.main(flags(weights, folder, tmp_path / "out"))
    found = page(tmp_path / "out", tmp_path / "page.html")
    assert "<script" not in found.text
    assert any('"><script>.jpg' in alt for alts in found.pictures.values() for alt in alts)


def test_codes_are_chosen_by_use():
    def choose(counts, *more):
        args = visualize_codebook.get_parser().parse_args(["--encoded", "x", *more])
        return visualize_codebook.choose_codes(args, np.array(counts))[0]

    counts = [5, 0, 9, 1, 7, 0, 3]
    assert choose(counts, "--top", "3") == [2, 4, 0]
    assert choose(counts, "--top", "99") == [2, 4, 0, 6, 3]
    assert choose(counts, "--spread", "3") == [2, 0, 3]
    assert choose(counts, "--spread", "99") == [2, 4, 0, 6, 3]
    assert choose(counts, "--codes", "1", "6", "1") == [1, 6]


def test_every_image_is_as_likely_to_be_shown(monkeypatch):
    """Over blocks of 4 images: 11 images have the code, 3 of them are drawn, each in 3 of 11 cases."""
    monkeypatch.setattr(visualize_codebook, "BLOCK", 4)
    codes = np.zeros((13, 6), dtype=np.uint16)
    codes[:11, 0], codes[5, :] = 2, 2  # an image full of the code counts once
    drawn = np.zeros(13)
    for seed in range(1100):
        (sample,) = visualize_codebook.sample_images(codes, [2], 3, 3, seed)
        assert sample.found == 11 and len(set(sample.images)) == 3
        drawn[sample.images] += 1
    assert (drawn[11:] == 0).all()
    assert drawn[:11].min() > 250 and drawn[:11].max() < 350  # 300 +- 15


def test_an_image_gives_a_second_patch_only_when_images_run_out():
    codes = np.array([[1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    patches = visualize_codebook.choose_patches(codes, 1, np.array([1, 0]), 3, seed=0)
    assert [image for image, _ in patches] == [0, 1, 0]
    assert len(set(patches)) == 3 and all(codes[image, place] == 1 for image, place in patches)
    assert len(visualize_codebook.choose_patches(codes, 1, np.array([1, 0]), 9, seed=0)) == 4


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (2, 3)])
def test_the_patch_is_in_the_middle_of_the_cut_out(place):
    patch, rows, columns = 16, 3, 4
    cells = torch.rand(3, rows, columns)
    image = drawing.stretch(cells, (rows * patch, columns * patch))
    picture = visualize_codebook.cut_out(image, *place, patch, context=3)
    factor = picture.shape[1] // (3 * patch)
    assert factor == 3
    for row in range(3):
        for column in range(3):
            y, x = place[0] + row - 1, place[1] + column - 1
            inside = 0 <= y < rows and 0 <= x < columns
            want = cells[:, y, x] if inside else torch.full((3,), visualize_codebook.OUTSIDE)
            middle = picture[:, (2 * row + 1) * 8 * factor, (2 * column + 1) * 8 * factor]
            torch.testing.assert_close(middle, want, atol=0.01, rtol=0)
    red = (picture == torch.tensor(drawing.RED).view(3, 1, 1)).all(0).nonzero()
    assert (red.min(), red.max()) == (46, 97)  # 48 to 95 is the patch


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--codes", "16"], "--codes 16: the codebook has 16 codes, 0 to 15"),
        (["--context", "2"], "--context 2"),
        (["--data_path", "/nowhere"], "/nowhere, the folder of the images, is not there: --data_path"),
        (["--data_path", "."], "no image of . could be read: --data_path"),
        (["--output", "."], "--output .: is a folder; name the file in it, such as name.html"),
        (["--output", "page.png"], "--output page.png: the name must end in .html"),
        (["--encoded", "/nowhere"], "--encoded /nowhere: codes.npy of encode_images.py is needed"),
    ],
)
def test_a_mistake_about_the_page_is_one_line(more, message, encoded, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        page(encoded, tmp_path / "page.html", *more)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_image_that_is_gone_is_named_and_left_out(data, weights, tmp_path, capsys):
    images = shutil.copytree(data, tmp_path / "images")
    encode_images.main(flags(weights, images, tmp_path / "codes"))
    (images / "a/0.jpg").unlink()
    capsys.readouterr()
    path = tmp_path / "page.html"
    shown = page(tmp_path / "codes", path, "--codes", *map(str, range(16)))
    said = capsys.readouterr().out
    assert said.count("a/0.jpg") >= 1 and said.count("left out") == 1
    alts = [alt for alts in shown.pictures.values() for alt in alts]
    assert any("a/1.jpg" in alt for alt in alts) and not any("a/0.jpg" in alt for alt in alts)


def test_token_maps_leave_out_what_has_gone_since(data, weights, tmp_path, monkeypatch, capsys):
    images, join = shutil.copytree(data, tmp_path / "images"), encode_images.join_shares
    monkeypatch.setattr(
        encode_images, "join_shares", lambda *args: (join(*args), (images / "a/0.jpg").unlink())
    )
    encode_images.main(flags(weights, images, tmp_path / "out", "--maps", "3"))
    assert "a/0.jpg" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "out/token_maps-0.png").convert("RGB")) / 255
    codes = torch.from_numpy(np.load(tmp_path / "out/codes.npy")[1].astype(int)).view(2, 2)
    want = drawing.token_map(codes, 16, (160, 160)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(picture[-160:, :160], want, atol=0.01)
    assert picture.shape[1] == 3 * 160 + 2 * drawing.GAP


def test_codes_without_their_description_are_refused(encoded, tmp_path, capsys):
    (tmp_path / "codes.npy").write_bytes((encoded / "codes.npy").read_bytes())
    about = json.loads((encoded / "about.json").read_text())
    for content, message in (
        (None, "cannot be read"),
        (json.dumps(about | {"images": 9}), "do not belong together"),
        ("[" * 100_000, "cannot be read"),
        (json.dumps({"images": 10, "grid": [2, 2]}), "cannot be read"),
        (json.dumps(about | {"grid": "ab"}), "grid is wrong"),
        (json.dumps(about | {"n_codes": 10**12}), "n_codes or the kind of the codes is wrong"),
        (json.dumps(about | {"n_codes": 1}), "codes.npy: has codes beyond the 1 of about.json"),
        (json.dumps(about), "files.txt: cannot be read"),
        ("", "files.txt: has no line for image"),
    ):
        if message.startswith("files.txt: has"):
            (tmp_path / "files.txt").write_text("a/0.jpg\n")
        elif content:
            (tmp_path / "about.json").write_text(content)
        with pytest.raises(SystemExit):
            page(tmp_path, tmp_path / "page.html")
        assert message in capsys.readouterr().err
