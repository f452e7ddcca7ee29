"""The page of the codebook: which images have a code, and where in them."""

import base64
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import encoded_names, encoding_flags, photos

import encode_images
import visualize_codebook
from visualization import drawing

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
def encoded(ten_photos, tokenizer_weight, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded")
    encode_images.main(encoding_flags(tokenizer_weight, ten_photos, out))
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
    codes, names = np.load(invented / "codes.npy"), encoded_names(invented)
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


def test_names_are_escaped(tokenizer_weight, tmp_path):
    folder = photos(tmp_path / "data", per_class=1, classes="a")
    (folder / "a/0.jpg").rename(folder / 'a/"><script>.jpg')
    encode_images.main(encoding_flags(tokenizer_weight, folder, tmp_path / "out"))
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
    """Over blocks of 4 images: 11 images have the code, 3 of them are drawn, each in 3
    of 11 cases.
    """
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


def test_an_image_that_is_gone_is_named_and_left_out(ten_photos, tokenizer_weight, tmp_path, capsys):
    images = shutil.copytree(ten_photos, tmp_path / "images")
    encode_images.main(encoding_flags(tokenizer_weight, images, tmp_path / "codes"))
    (images / "a/0.jpg").unlink()
    capsys.readouterr()
    path = tmp_path / "page.html"
    shown = page(tmp_path / "codes", path, "--codes", *map(str, range(16)))
    said = capsys.readouterr().out
    assert said.count("a/0.jpg") >= 1 and said.count("left out") == 1
    alts = [alt for alts in shown.pictures.values() for alt in alts]
    assert any("a/1.jpg" in alt for alt in alts) and not any("a/0.jpg" in alt for alt in alts)


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
