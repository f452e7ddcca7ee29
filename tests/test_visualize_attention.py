"""Attention maps: the right rows of the right matrix at any size, and their figure;
drawing in general is in test_shown_images.py.
"""

import numpy as np
import pytest
import torch
from golden_values import TINY, fill
from PIL import Image
from tiny_runs import as_flags, photos, student

import pretrained
import visualize_attention
from modeling_finetune import VisionTransformer
from visualization import inputs
from visualization.drawing import CAPTION, GAP, RED

SIDE = 160 + CAPTION  # of a captioned picture: 48 to 64 pixels enlarged


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    settings = {
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": True,
        "init_values": 0.1,
        "num_classes": 0,
        "img_size": 32,
    }
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save({"model": fill(VisionTransformer(**(TINY | settings)), 3).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("photos"), per_class=2)


def figure(weights, images, path, *more):
    """(height, width, 3) in [0, 1]."""
    fixed = [
        "--checkpoint",
        str(weights),
        "--image",
        *map(str, images),
        "--output",
        str(path),
        "--device",
        "cpu",
    ]
    visualize_attention.main([*fixed, *more])
    return np.asarray(Image.open(path).convert("RGB")) / 255


def high(pictures):
    return pictures * SIDE + (pictures - 1) * GAP


def wide(pictures):
    return pictures * 160 + (pictures - 1) * GAP


# ── Numbers ──


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (48, 80)])
def test_maps_at_any_size_are_the_rows_of_the_attention(size, weights):
    model, _ = pretrained.open_backbone(str(weights), size)
    image, grid = torch.rand(3, *size), (size[0] // 16, size[1] // 16)
    tokens = [0, 1 + grid[1], grid[0] * grid[1]]
    maps = visualize_attention.compute_attention(model, image, [1, 3], tokens)
    assert maps.shape == (2, 4, 3, *grid)
    for number, block in enumerate((1, 3)):
        whole = model.attention_maps(image[None], block)[0]
        assert whole.shape == (4, 1 + grid[0] * grid[1], 1 + grid[0] * grid[1])
        torch.testing.assert_close(whole.sum(-1), torch.ones(whole.shape[:2]))
        for query, token in enumerate(tokens):
            for row, column in ((0, 1), (grid[0] - 1, 0)):
                want = whole[:, token, 1 + row * grid[1] + column]
                assert torch.equal(maps[number, :, query, row, column], want)


def test_a_model_at_another_size_is_the_one_its_file_gives(weights):
    """Not resized twice: from the file's own grid, whatever size was used last."""
    own, _ = pretrained.open_backbone(str(weights))
    want, _ = pretrained.open_backbone(str(weights), (48, 80))
    other = visualize_attention.resize_model(own, (48, 80)).state_dict()
    assert other.keys() == want.state_dict().keys()
    assert all(torch.equal(value, other[key]) for key, value in want.state_dict().items())
    assert visualize_attention.resize_model(own, (32, 32)) is own


@pytest.mark.parametrize(
    ("sides", "size"),
    [((100, 100), (64, 64)), ((200, 100), (64, 128)), ((100, 163), (112, 64)), ((640, 633), (64, 64))],
)
def test_whole_images_keep_their_shape_to_the_nearest_patch(sides, size):
    assert visualize_attention.whole_image_size(Image.new("RGB", sides), 64, 16) == size  # PIL: width first


def test_queries_are_counted_row_by_row():
    assert visualize_attention.query_token("cls", (3, 5)) == 0
    assert visualize_attention.query_token("0,0", (3, 5)) == 1
    assert visualize_attention.query_token("2,1", (3, 5)) == 12


# ── Drawing ──


@pytest.mark.parametrize(
    ("token", "box"), [(7, (62, 14, 129, 33)), (1, (0, 0, 65, 17)), (15, (126, 62, 191, 79))]
)
def test_the_frame_is_around_the_query(token, box):
    """3 x 5 patches of 64 x 16 pixels; the line is 2 wide, outside the patch where
    there is room. CLS has no frame.
    """
    picture = visualize_attention.mark_queries(torch.zeros(3, 192, 80), [0, token], (3, 5))
    red = (picture == torch.tensor(RED).view(3, 1, 1)).all(0).nonzero()
    assert (*red.amin(0).tolist(), *red.amax(0).tolist()) == box  # top, left, bottom, right


# ── The figure ──


def test_a_row_for_each_query_with_the_mean_and_every_head(weights, data, tmp_path):
    image = data / "a/0.jpg"
    picture = figure(weights, [image], tmp_path / "x.png", "--query", "cls", "1,0")
    assert picture.shape[:2] == (high(2), wide(6))  # the image, the mean, 4 heads
    red = np.isclose(picture, RED, atol=0.01).all(-1).nonzero()
    top = SIDE + GAP + CAPTION + 80  # of patch 1,0 in the second row's first picture
    assert (red[0].min(), red[0].max(), red[1].min(), red[1].max()) == (top - 2, top + 79, 0, 81)
    narrow = figure(weights, [image], tmp_path / "x.png", "--query", "cls", "1,0", "--columns", "3")
    assert narrow.shape[:2] == (high(4), wide(3))


def test_a_figure_of_reference_points_and_one_of_the_blocks(weights, data, tmp_path):
    points = ["--query", "cls", "0,0", "1,1", "--mean_only"]
    assert figure(weights, [data], tmp_path / "x.png", *points).shape[:2] == (high(4), wide(4))
    blocks = ["--query", "cls", "--layer", "all", "--count", "1"]
    assert figure(weights, [data], tmp_path / "x.png", *blocks).shape[:2] == (high(1), wide(5))
    assert figure(weights, [data / "a", data / "b"], tmp_path / "x.png", *blocks).shape[:2] == (
        high(2),
        wide(5),
    )


def test_the_mean_is_that_of_heads_and_the_threshold_acts(weights, data, tmp_path):
    args = visualize_attention.get_parser().parse_args(
        ["--checkpoint", "x", "--image", "x", "--threshold", "0.6"]
    )
    maps = torch.rand(1, 4, 3, 5)
    named = visualize_attention.name_maps(maps, [3])
    assert [name for name, _ in named] == ["mean", "head 0", "head 1", "head 2", "head 3"]
    torch.testing.assert_close(named[0][1], torch.stack([heat for _, heat in named[1:]]).mean(0))
    blocks = visualize_attention.name_maps(torch.rand(2, 4, 3, 5), [0, 1])
    assert [name for name, _ in blocks] == ["block 0", "block 1"]
    assert args.threshold == 0.6
    image = data / "a/0.jpg"
    heat, kept = (
        figure(weights, [image], tmp_path / "x.png", *more) for more in ([], ["--threshold", "0.6"])
    )
    assert heat.shape == kept.shape and not np.array_equal(heat, kept)


def test_whole_images_each_in_its_shape(weights, tmp_path, capsys):
    for name, size in (("1.png", (96, 48)), ("2.png", (48, 96))):
        Image.fromarray(np.random.RandomState(0).randint(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(
            tmp_path / name
        )
    (tmp_path / "3.png").write_bytes(b"no image")
    picture = figure(
        weights,
        [tmp_path],
        tmp_path / "out/x.png",
        *as_flags(keep_aspect=True, query="1,3", mean_only=True, input_size=64),
    )
    # 64 x 128 and 128 x 64, enlarged by 2
    assert picture.shape[:2] == (2 * CAPTION + GAP + 128 + 256, 2 * 256 + GAP)
    out = capsys.readouterr().out
    assert "3.png" in out and "left out" in out


def test_files_that_are_no_images_are_named_once(weights, data, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("of the user")
    (tmp_path / "0.jpg").write_bytes((data / "a/0.jpg").read_bytes())
    figure(weights, [tmp_path], tmp_path / "out" / "x.png")
    assert capsys.readouterr().out.count("1 .txt") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--query", "2,0"], "--query 2,0: the grid has 2 rows and 2 columns"),
        (["--query", "left"], "--query left: give cls or row,column"),
        (["--layer", "4"], "--layer 4: the model has 4 blocks"),
        (["--layer", "all", "--mean_only"], "leave --mean_only out"),
        (["--keep_aspect", "--input_size", "32x64"], "--keep_aspect takes the shorter side alone"),
        (["--input_size", "2048"], "2048 x 2048 pixels does not fit"),
        (["--input_size", "40"], "--input_size"),
        (["--crop_pct", "1.0", "--keep_aspect"], "--crop_pct has no effect with --keep_aspect"),
    ],
)
def test_a_users_mistake_is_one_line(more, message, weights, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        figure(weights, [data], tmp_path / "x.png", *more)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ── Which images, which file, which view ──


@pytest.fixture
def mixed(data, tmp_path):
    """Three images of a folder and what no decoder takes: an unknown format, a file cut
    off, and a header that lies.
    """
    folder = tmp_path / "mixed"
    folder.mkdir()
    whole = (data / "a/0.jpg").read_bytes()
    for name, content in {
        "0": whole,
        "1": b"no image",
        "2": whole,
        "3": whole[:200],
        "4": b"",
        "5": whole,
    }.items():
        (folder / f"{name}.jpg").write_bytes(content)
    return folder


def test_a_broken_image_of_a_folder_is_named_and_left_out(mixed, weights, tmp_path, capsys):
    picture = figure(weights, [mixed], tmp_path / "x.png", "--mean_only")
    assert picture.shape[:2] == (high(3), wide(2))
    lines = [line for line in capsys.readouterr().out.splitlines() if "cannot read" in line]
    assert [next(name for name in "012345" if f"{name}.jpg" in line) for line in lines] == ["1", "3", "4"]


def test_whatever_a_decoder_raises_leaves_one_image_out(mixed, monkeypatch):
    def load(path, pixels):
        if path.endswith("2.jpg"):
            raise SyntaxError("broken PNG file")  # as PIL does
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(inputs, "load", load)
    shown = [path[-5:] for path, _ in inputs.read_shown(inputs.find_shown([str(mixed)], 9, "--image"))]
    assert shown == ["0.jpg", "1.jpg", "3.jpg", "4.jpg", "5.jpg"]
    with pytest.raises(inputs.UserError, match=r"2\.jpg: cannot be read \(broken PNG file\)"):
        inputs.find_shown([str(mixed / "2.jpg")], 9, "--image")
    with pytest.raises(inputs.UserError, match="no image could be read"):
        list(inputs.read_shown([str(mixed / "2.jpg")]))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--image", "/nowhere", "--image /nowhere: no such file or folder"),
        ("--image", __file__, f"--image {__file__}: cannot be read"),
        ("--output", "{}", "{}: is a folder; name the file in it, such as {}/name.png"),
        ("--output", "{}/new/", "{}/new/: is a folder"),
        ("--output", "{}/x.xyz", "{}/x.xyz: the name must end in .png .jpg"),
        ("--output", "{}/x", "{}/x: the name must end in"),
        ("--output", "{}/file/x.png", "{}/file/x.png: its folder cannot be made"),
    ],
)
def test_images_and_output_are_looked_at_before_the_model(
    flag, value, message, data, tmp_path, capsys, monkeypatch
):
    def load(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(pretrained, "open_backbone", load)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        figure("x.pth", [data], tmp_path / "x.png", flag, value.format(tmp_path))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.replace("{}", str(tmp_path)) in error and flag in error and error.count("\n") == 1


def test_the_view_is_that_of_evaluation_unless_told(weights, tmp_path):
    """A red border of 3 pixels around 64: gone in the middle 87.5 %, there with
    --crop_pct 1 and in whole images.
    """
    pixels = np.full((64, 64, 3), (255, 0, 0), dtype=np.uint8)
    pixels[3:-3, 3:-3] = (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    size = ["--input_size", "64", "--mean_only"]
    for more, corner in (([], 0), (["--crop_pct", "1.0"], 1), (["--keep_aspect"], 1)):
        picture = figure(weights, [tmp_path / "x.png"], tmp_path / "out.png", *size, *more)
        assert picture[CAPTION + 2, 2] == pytest.approx((corner, 0, 1 - corner), abs=0.02)


def test_a_normalization_that_is_not_the_checkpoints_is_told(data, tmp_path, capsys):
    own = student(tmp_path / "student.pth", imagenet_default_mean_and_std=False)
    image, flag = data / "a/0.jpg", "--imagenet_default_mean_and_std"
    plain = figure(own, [image], tmp_path / "x.png")
    assert "warning" not in capsys.readouterr().out
    asked = figure(own, [image], tmp_path / "x.png", flag)
    assert f"warning: {own} was trained with mean and std 0.5: {flag} is left out" in capsys.readouterr().out
    assert np.array_equal(plain, asked)
