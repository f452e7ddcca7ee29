"""What all visualizations share: how pictures are drawn and written, and which images
of a folder are shown.
"""

import pytest
import torch
from PIL import Image

from visualization import drawing, inputs
from visualization.drawing import CAPTION, GAP


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.999, 1.0])
def test_the_kept_patches_hold_the_share_and_are_the_fewest(share):
    for seed in range(20):
        weights = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed)) ** 4
        kept = drawing.keep_most(weights, share)
        total, inside = weights.double().sum(), weights.double()[kept]
        assert kept.shape == weights.shape and inside.sum() >= share * total * (1 - 1e-12)
        assert inside.sum() - inside.min() < share * total  # one fewer, and be it the smallest, is too few
        assert not kept.all() or share > 0.99
        assert (weights[~kept] <= inside.min()).all()


def test_equal_weights_and_a_single_peak():
    assert drawing.keep_most(torch.ones(4, 5), 0.6).sum() == 12
    peak = torch.zeros(3, 3)
    peak[1, 2] = 1
    assert drawing.keep_most(peak, 0.99).nonzero().tolist() == [[1, 2]]


def test_the_spotlight_is_on_the_kept_patches():
    image = torch.rand(3, 32, 48)
    kept = torch.tensor([[True, False, False], [False, False, True]])
    picture = drawing.spotlight(image, kept)
    assert torch.equal(picture[:, :16, :16], image[:, :16, :16]) and torch.equal(
        picture[:, 16:, 32:], image[:, 16:, 32:]
    )
    assert not torch.isclose(picture[:, :16, 16:], image[:, :16, 16:]).all(0).any()


def test_captions_fit_and_leave_the_picture_alone():
    picture = torch.rand(3, 20, 60)
    for text in (
        "head 0",
        "a name that is longer than sixty pixels.jpg",
        "no\udcff utf-8",
        "\N{HIRAGANA LETTER A}",
    ):
        captioned = drawing.add_caption(picture, text)
        assert captioned.shape == (3, 20 + CAPTION, 60)
        assert torch.equal(captioned[:, CAPTION:], picture)
        assert captioned[:, :CAPTION].min() < 0.5


@pytest.mark.parametrize("letters", ["eé", "uû", "Жя", "αλ", "ßø"])
def test_captions_have_the_letters_of_other_alphabets(letters):
    blank = torch.zeros(3, 4, 40)
    first, second, missing = (drawing.add_caption(blank, letter) for letter in (*letters, "\U000f0000"))
    assert not any(torch.equal(*pair) for pair in ((first, second), (first, missing), (second, missing)))


def test_pictures_of_several_sizes_are_joined_with_white():
    pictures = [torch.zeros(3, 4, 5), torch.zeros(3, 6, 3), torch.zeros(3, 2, 2)]
    joined = drawing.gallery(pictures, columns=2)
    assert joined.shape == (3, 6 + GAP + 2, 5 + GAP + 3)
    assert (joined == 0).sum() == 3 * (20 + 18 + 4)


def test_the_images_of_a_folder_are_evenly_spread(tmp_path):
    for number in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    one = str(tmp_path / "7.png")
    shown = inputs.find_shown([str(tmp_path), one], 4, "--image")
    assert [path[-5] for path in shown] == ["0", "2", "5", "7", "7"]
    assert len(inputs.find_shown([str(tmp_path)], 99, "--image")) == 10


def test_a_picture_too_large_for_its_format_is_one_line(tmp_path):
    picture = torch.zeros(3, 70_000, 1)
    inputs.save_picture(picture, str(tmp_path / "x.png"), "--output")
    with pytest.raises(
        inputs.UserError,
        match=(r"--output .*x.jpg: 1 x 70000 pixels cannot be written " r".* PNG takes every size"),
    ):
        inputs.save_picture(picture, str(tmp_path / "x.jpg"), "--output")


@pytest.mark.parametrize("ending", inputs.PICTURES)
def test_every_accepted_ending_can_be_written(ending, tmp_path):
    name = str(tmp_path / f"new/x{ending.upper()}")
    inputs.prepare_output(name, inputs.PICTURES, "--output")
    inputs.save_picture(torch.rand(3, 16, 16), name, "--output")
    assert (tmp_path / f"new/x{ending.upper()}").stat().st_size > 0
