"""Access to tests/golden: numbers of the published implementation, and the weights and
inputs behind them (fill.py).
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch

import modeling_finetune

GOLDEN = Path(__file__).parent / "golden"

_spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
fill_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill_module)
fill, images, mask = fill_module.fill, fill_module.images, fill_module.mask

TINY = dict(img_size=64, patch_size=16, embed_dim=48, depth=4, num_heads=4, mlp_ratio=4, qkv_bias=True)


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def data(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def assert_keys(model: torch.nn.Module, case: str) -> None:
    """Names, order and shapes of the state dict are the published ones."""
    mine = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert mine == data("state_dict_keys")[case]


def close(mine: torch.Tensor, golden: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(mine.float(), golden.float(), atol=atol, rtol=0)


def vit(size=64, **settings):
    settings = {
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": True,
        "init_values": 0.1,
        "num_classes": 10,
    } | settings
    return fill(modeling_finetune.VisionTransformer(**(TINY | {"img_size": size} | settings)), 3).eval()
