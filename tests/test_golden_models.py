"""The models reproduce the published implementation: names, shapes, logits, losses,
gradients.
"""

import pytest
import torch
import torch.nn.functional as F
from golden_values import TINY, arrays, assert_keys, close, data, fill, images, mask
from numpy.random import RandomState

import modeling_finetune
import modeling_pretrain
import modeling_vqkd
from modeling_finetune import VisionTransformer, resize_rel_pos_bias_table
from modeling_pretrain import (
    VisionTransformerForMaskedImageModeling,
    VisionTransformerForMaskedImageModelingCLS,
)

SHARED = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)
TINY_CLS = dict(TINY, vocab_size=128, **SHARED)

PRETRAINING = {
    "pretrain_tiny_cls_pt": lambda: VisionTransformerForMaskedImageModelingCLS(
        **TINY_CLS, early_layers=3, head_layers=2, shared_lm_head=True
    ),
    "pretrain_tiny_cls_pt_unshared": lambda: VisionTransformerForMaskedImageModelingCLS(
        **TINY_CLS, early_layers=2, head_layers=1, shared_lm_head=False
    ),
    "pretrain_tiny_v1": lambda: VisionTransformerForMaskedImageModeling(**TINY_CLS),
    "pretrain_tiny_v1_abspos": lambda: VisionTransformerForMaskedImageModeling(**TINY, vocab_size=128),
    "pretrain_base_cls_pt": lambda: modeling_pretrain.beit_base_patch16_224_8k_vocab_cls_pt(
        **SHARED, early_layers=9, head_layers=2
    ),
    "pretrain_base_v1": lambda: modeling_pretrain.beit_base_patch16_224_8k_vocab(**SHARED),
}


def slow_unless_tiny(cases):
    return [case if "tiny" in case else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", slow_unless_tiny(PRETRAINING))
def test_pretraining_model(case):
    model, golden, facts = PRETRAINING[case](), arrays(case), data(case)
    assert_keys(model, case)
    seed, tiny = facts["seed"], "tiny" in case
    fill(model, seed).train()
    size, masked = (64, 6) if tiny else (224, 75)
    x = (images(2, size, seed + 1) - 0.5) / 0.5
    hidden = mask(2, size // 16, masked, seed + 2)
    vocab = model.lm_head.out_features
    labels = torch.from_numpy(RandomState(seed + 3).randint(0, vocab, size=int(hidden.sum())))

    outputs = model(x, hidden)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    losses = [F.cross_entropy(logits, labels) for logits in outputs]
    assert [float(loss) for loss in losses] == pytest.approx(facts["losses"], rel=1e-4)
    sum(losses).backward()
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    assert norms == pytest.approx(facts["grad_norms"], rel=2e-3, abs=1e-7)

    with torch.no_grad():
        tokens = model(x, hidden, return_patch_tokens=True)
    for branch, (logits, patches) in enumerate(
        zip(outputs, tokens if len(outputs) == 2 else (tokens,), strict=True)
    ):
        n, m = patches.shape[1], len(labels)
        close(logits[:: max(1, m // 12), :64], golden[f"logits{branch}"])
        close(patches[:, :: max(1, n // 8), :32], golden[f"tokens{branch}"])


FINETUNING = {
    "finetune_tiny": (
        70,
        lambda: VisionTransformer(
            **TINY, num_classes=10, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1
        ),
    ),
    "finetune_tiny_cls": (
        80,
        lambda: VisionTransformer(
            **TINY, num_classes=10, use_shared_rel_pos_bias=True, use_mean_pooling=False, init_values=0.1
        ),
    ),
    "finetune_base": (
        90,
        lambda: modeling_finetune.beit_base_patch16_224(
            use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1
        ),
    ),
}


@pytest.mark.parametrize("case", slow_unless_tiny(FINETUNING))
def test_finetuning_model(case):
    seed, build = FINETUNING[case]
    model, golden = build(), arrays(case)
    assert_keys(model, case)
    fill(model, seed).eval()
    x = (images(2, 64 if "tiny" in case else 224, seed + 1) - 0.5) / 0.5
    with torch.no_grad():
        close(model(x), golden["logits"])
        patches = model.forward_features(x, return_patch_tokens=True)
        close(patches[:, :: max(1, patches.shape[1] // 8), :32], golden["patch_tokens"])


def tiny_vqkd():
    encoder = dict(TINY, depth=2, num_classes=0)
    decoder = dict(TINY, depth=1, num_classes=0, img_size=4, patch_size=1, in_chans=8)
    return modeling_vqkd.VQKD(encoder, decoder, n_embed=64, embed_dim=8)


VQKD = {
    "vqkd_tiny": (100, 64, tiny_vqkd),
    "vqkd_base_3x768x12": (
        110,
        224,
        lambda: modeling_vqkd.vqkd_encoder_base_decoder_3x768x12_clip(as_tokenizer=True),
    ),
}


@pytest.mark.parametrize("case", slow_unless_tiny(VQKD))
def test_tokenizer(case):
    seed, size, build = VQKD[case]
    model, golden = build(), arrays(case)
    assert_keys(model, case)
    fill(model, seed).eval()
    x = images(2, size, seed + 1)
    with torch.no_grad():
        features = model.features(model.pre_process(x))
        z_q, indices, loss = model.encode(model.pre_process(x))
        close(features[:, ::4], golden["feats"])
        clear = golden["margin"] > 1e-3
        assert clear.float().mean() > 0.5
        assert torch.equal(indices[clear], golden["ids"].flatten()[clear].long())
        assert torch.equal(model.get_codebook_indices(x), indices.view(2, -1))
        assert float(loss) == pytest.approx(float(golden["loss"]), rel=1e-4)
        close(model.decode(z_q)[:, ::8, :64], golden["rec"])


@pytest.mark.parametrize("case", ["pretrain_large_cls_pt", "pretrain_large_v1", "finetune_large"])
def test_large_models_have_the_published_keys(case):
    with torch.device("meta"):
        if case == "finetune_large":
            model = modeling_finetune.beit_large_patch16_224(
                use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=1e-5
            )
        elif case == "pretrain_large_v1":
            model = modeling_pretrain.beit_large_patch16_224_8k_vocab(**SHARED)
        else:
            model = modeling_pretrain.beit_large_patch16_224_8k_vocab_cls_pt(
                **SHARED, early_layers=21, head_layers=2
            )
    assert_keys(model, case)


@pytest.mark.parametrize("grids", [(14, 24), (14, 32), (14, 12), (4, 6)])
def test_bias_tables_are_resized_as_published(grids):
    golden = arrays("rel_pos_resize")
    source, target = (golden[f"{end}_{grids[0]}_{grids[1]}"] for end in ("src", "dst"))
    close(resize_rel_pos_bias_table(source, grids[1]), target, atol=1e-6)
