"""Blockwise masks: the published statistics (golden), the exact count, odd
arguments.
"""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_values import arrays

from layers.token_subset import MaskedPositions, list_masked
from masking_generator import MaskingGenerator, scaled_mask_count, scaled_min_block

MASKS = 4000


def components(mask: np.ndarray) -> int:
    """Number of 4-connected regions of ones."""
    todo = set(zip(*np.nonzero(mask), strict=True))
    count = 0
    while todo:
        count += 1
        stack = [todo.pop()]
        while stack:
            y, x = stack.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & todo
            todo -= near
            stack += near
    return count


@pytest.fixture(scope="module")
def masks():
    random.seed(1)
    generator = MaskingGenerator((14, 14), num_masking_patches=75, min_num_patches=16)
    return np.stack([generator() for _ in range(MASKS)])


def test_masks_have_the_published_statistics(masks):
    golden = {name: value.numpy() for name, value in arrays("masking").items()}
    assert (masks.sum(axis=(1, 2)) == 75).all()
    assert set(np.unique(masks)) == {0, 1}
    # Sampling noise of 4,000 masks is about sqrt(10) times that of the golden README's
    # 40,000.
    assert np.abs(masks.mean(axis=0) - golden["prob"]).max() < 0.035
    histogram = np.bincount([components(m) for m in masks], minlength=len(golden["components"])) / MASKS
    assert np.abs(histogram - golden["components"]).sum() / 2 < 0.025
    runs = (masks[:, :, 1:] & masks[:, :, :-1]).sum(axis=(1, 2)) / 75
    assert runs.mean() == pytest.approx(golden["runs"][0], abs=0.003)
    assert runs.std() == pytest.approx(golden["runs"][1], abs=0.003)


def test_seed_of_python_decides():
    generator = MaskingGenerator(14, 75, 16)
    random.seed(3)
    first, second = generator(), generator()
    random.seed(3)
    assert (generator() == first).all()
    assert (first != second).any()
    assert first.dtype.kind == "i"


@pytest.mark.parametrize(
    ("size", "count", "least", "most"),
    [
        (1, 1, 4, None),
        (2, 3, 4, None),
        (2, 4, 16, None),
        ((3, 7), 20, 4, None),
        ((3, 7), 21, 16, 4),
        (8, 0, 4, None),
        (8, 64, 4, None),
        (8, 26, 4, 1),
        (14, 196, 16, None),
        ((1, 14), 7, 4, None),
    ],
)
def test_count_is_exact_on_odd_grids(size, count, least, most):
    generator = MaskingGenerator(size, count, least, most)
    for _ in range(20):
        mask = generator()
        assert mask.shape == (size if isinstance(size, tuple) else (size, size))
        assert mask.sum() == count


def test_no_block_adds_more_than_the_maximum(monkeypatch):
    place, added = MaskingGenerator._mask_block, []

    def spy(self, mask, most):
        added.append(place(self, mask, most))
        return added[-1]

    monkeypatch.setattr(MaskingGenerator, "_mask_block", spy)
    for _ in range(50):
        MaskingGenerator(14, 75, 16, 20)()
    assert 16 <= max(added) <= 20


def test_blocks_are_smaller_than_the_grid():
    generator = MaskingGenerator((4, 6), 24, min_num_patches=8)
    for _ in range(300):
        mask = np.zeros((4, 6), dtype=int)
        generator._mask_block(mask, 24)
        assert mask.any(axis=1).sum() < 4
        assert mask.any(axis=0).sum() < 6


def test_impossible_arguments():
    with pytest.raises(ValueError, match="17 patches cannot be masked on a 4x4 grid"):
        MaskingGenerator(4, 17)
    with pytest.raises(ValueError, match="-1 patches"):
        MaskingGenerator(4, -1)
    with pytest.raises(ValueError, match="negative"):
        MaskingGenerator(4, 2, min_aspect=0)


def test_scaled_defaults():
    assert [scaled_mask_count(grid) for grid in (14, 8, 16, 24, 1)] == [75, 24, 98, 220, 1]
    assert [scaled_min_block(grid) for grid in (14, 8, 4, 24)] == [16, 4, 4, 49]


@pytest.mark.parametrize("rows", [["0110", "1001"], ["0110", "1000"], ["0000", "0000"], []])
def test_positions_say_all_of_a_mask(rows):
    """Equally many in each image, not so, none, no image."""
    mask = torch.tensor([[cell == "1" for cell in row] for row in rows]).view(len(rows), 4).bool()
    positions = MaskedPositions.of(mask, torch.device("cpu"))
    listed = MaskedPositions.of(mask, torch.device("cpu"), list_masked(mask))
    assert torch.equal(positions.patches, listed.patches)
    assert positions[1:] == listed[1:] == (len(rows), 4, 2 if rows == ["0110", "1001"] else None)
    assert torch.equal(positions.mask(), mask)
    values, tokens = torch.randn(len(rows) * 4, 3), torch.randn(len(rows), 5, 3)
    assert torch.equal(positions.select(values), values[mask.flatten()])
    with_cls = [F.pad(mask, (1, 0), value=value) for value in (False, True)]
    assert torch.equal(tokens.flatten(0, 1)[positions.tokens()], tokens[with_cls[0]])
    for chosen, subset in zip(with_cls, map(positions.subset, (False, True)), strict=True):
        assert (subset is None) == (positions.per_image is None)
        if subset is not None:
            assert torch.equal(subset.gather(tokens).flatten(0, 1), tokens[chosen])
            assert torch.equal(subset.token_index, chosen.nonzero()[:, 1])
