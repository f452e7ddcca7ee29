"""Small models to export, and the command that exports them."""

from pathlib import Path

import torch
from golden_values import TINY, fill, images

import export_checkpoint
import modeling_finetune
import modeling_pretrain

HEADS = ("--num_heads", "4")  # not to be read from the shapes of a model without tables
CLOSE = 1e-5
BLOCK_BIAS = dict(use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1)
CLASSIFIERS = {
    "mean": BLOCK_BIAS,
    "cls": dict(use_shared_rel_pos_bias=True, use_mean_pooling=False, init_values=0.1),
    "plain": dict(qkv_bias=False, init_values=0),
    "both": dict(use_rel_pos_bias=True, use_shared_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
}
FLAGS = {"imagenet_default_mean_and_std": True, "input_size": 64, "drop_path": 0.2}


def classifier(case: str) -> modeling_finetune.VisionTransformer:
    return fill(
        modeling_finetune.VisionTransformer(**TINY | CLASSIFIERS[case], num_classes=10), seed=7
    ).eval()


def pretraining() -> modeling_pretrain.VisionTransformerForMaskedImageModelingCLS:
    kind = modeling_pretrain.VisionTransformerForMaskedImageModelingCLS
    settings = dict(use_shared_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1, vocab_size=128)
    return fill(kind(**TINY | settings, early_layers=3), seed=8).eval()


def inputs() -> torch.Tensor:
    return (images(2, 64, 9) - 0.5) / 0.5


def save(model: torch.nn.Module, path: Path, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "args": FLAGS, **more}, path)
    return path


def export(source: Path, to: str, output: Path, *flags: str) -> Path:
    export_checkpoint.main(["--checkpoint", str(source), "--to", to, "--output", str(output), *flags])
    return output


def assert_same(mine: dict, theirs: dict) -> None:
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
