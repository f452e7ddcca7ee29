"""Windows over an image, several views, and the labels of a picture of any size,
against the plain way.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine_for_segmentation import pixel_accuracy, pixel_loss, scores_of
from runtime.device import Precision
from segmentation import sliding_window
from segmentation.mask_files import IGNORED
from segmentation.sliding_window import SlidingWindow, classes_at, predict, scores, slide, starts, strip

FP32 = Precision("cpu", None)


class Local(nn.Module):
    """Each pixel's logits depend on its 5 x 5 neighborhood, and on where in the window
    it lies.
    """

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, classes, 5, padding=2)

    def forward(self, x):
        assert not self.training
        return self.conv(x) + torch.arange(x.shape[-1]) / 100


def test_windows_cover_the_side():
    assert starts(512, 512, 341) == [0]
    assert starts(683, 512, 341) == [0, 171]
    assert starts(1024, 512, 341) == [0, 341, 512]
    assert starts(1194, 512, 341) == [0, 341, 682]


def test_overlaps_are_averaged():
    model = Local().eval()
    image = torch.randn(1, 3, 20, 31)
    how = SlidingWindow(window=12, stride=8, batch=3)
    total, count = torch.zeros(1, 4, 20, 31), torch.zeros(20, 31)
    for y in (0, 8):
        for x in (0, 8, 16, 19):
            total[..., y : y + 12, x : x + 12] += model(image[..., y : y + 12, x : x + 12])
            count[y : y + 12, x : x + 12] += 1
    torch.testing.assert_close(slide(model, image, how), total / count)


def test_an_image_smaller_than_the_window_is_one_window():
    model, image = Local().eval(), torch.randn(1, 3, 10, 7)
    torch.testing.assert_close(slide(model, image, SlidingWindow(window=12, stride=8)), model(image))


def test_several_views_are_the_mean_of_their_probabilities():
    model, image = Local().eval(), torch.randn(3, 16, 24)
    how = SlidingWindow(window=None, scales=(0.5, 1.5), flip=True)
    total = torch.zeros(4, 16, 24)
    for scale in (0.5, 1.5):
        view = F.interpolate(image[None], size=(int(16 * scale), int(24 * scale)), mode="bilinear")
        for flipped in (False, True):
            logits = model(view.flip(3)).flip(3) if flipped else model(view)
            total += F.interpolate(logits, size=(16, 24), mode="bilinear")[0].softmax(0) / 4
    torch.testing.assert_close(scores(model, image, how), total)


@pytest.mark.parametrize("size", [(37, 53), (8, 9), (100, 3), (16, 24)])
def test_strips_are_the_whole_resized(size, monkeypatch):
    logits = torch.randn(5, 16, 24)
    whole = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    for top in range(0, size[0], 3):
        bottom = min(top + 3, size[0])
        torch.testing.assert_close(strip(logits, size, top, bottom), whole[:, top:bottom])
    monkeypatch.setattr(sliding_window, "STRIP", 5 * size[1] * 4)
    assert torch.equal(classes_at(logits, size), whole.argmax(0))


def test_memory_is_bounded_by_the_networks_scale(monkeypatch):
    """Of the picture's own size no more than a strip of scores is made."""
    sizes = []
    real = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, **k: sizes.append(k["size"]) or real(x, **k))
    monkeypatch.setattr(sliding_window, "STRIP", 1 << 16)
    labels = predict(
        Local().eval(), torch.randn(3, 32, 32), (2000, 1000), SlidingWindow(window=16, stride=8), FP32
    )
    assert labels.shape == (2000, 1000)
    assert max(height * width for height, width in sizes) * 4 <= 1 << 16


# ── What is counted ──


def test_scores_of_a_matrix_by_hand():
    matrix = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 4, 0, 0]])
    found = scores_of(matrix)
    assert found.iou[:2] == pytest.approx([100 * 6 / 9, 100 * 3 / 10])
    assert found.iou[3] == 0.0
    assert found.iou[2] != found.iou[2]  # neither there nor said: in no mean
    assert found.miou == pytest.approx(100 * (6 / 9 + 0.3 + 0) / 3)
    assert found.macc == pytest.approx(100 * (6 / 8 + 3 / 4 + 0) / 3)
    assert found.aacc == pytest.approx(100 * 9 / 16)


def test_ignored_pixels_count_nowhere():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randint(0, 3, (2, 4, 5))
    labels[0, :2] = IGNORED
    kept = labels != IGNORED
    rows = logits.permute(0, 2, 3, 1)[kept]
    torch.testing.assert_close(pixel_loss(logits, labels), F.cross_entropy(rows, labels[kept]))
    torch.testing.assert_close(
        pixel_accuracy(logits, labels), (rows.argmax(1) == labels[kept]).float().mean()
    )
    nothing = pixel_loss(logits, torch.full_like(labels, IGNORED))
    nothing.backward()
    assert float(nothing) == 0
    assert float(logits.grad.abs().sum()) == 0
