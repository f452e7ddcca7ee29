"""What makes a training step faster or smaller gives the numbers of the plain way."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engine
import modeling_finetune
import modeling_vqkd
from layers import cpu_bf16
from layers import linear_cross_entropy as fused
from layers.attention import fused_attention
from layers.cpu_bf16 import CpuLinear, weight_gradient
from layers.linear_cross_entropy import linear_cross_entropy
from layers.rel_pos_bias import gather_bias, relative_position_index
from vit_backbone import PatchEmbed, cast_frozen, recompute_blocks
from vqkd_teachers import build_teacher

BF16 = torch.bfloat16


def far(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Distance relative to the size of `theirs`."""
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


def autocast(dtype):
    return torch.autocast("cpu", dtype or BF16, enabled=dtype is not None)


# ── Cross-entropy over the codes ──
def head_and_inputs(patches=50, width=48, codes=256):
    torch.manual_seed(0)
    head, hidden = nn.Linear(width, codes), torch.randn(patches, width)
    nn.init.normal_(head.weight, std=0.3)
    return head, hidden, torch.randint(codes, (patches,))


def learned(way, head, hidden, target, dtype, scale=1.0):
    """(loss, answers, gradients of hidden, weight and bias divided by the scale of the
    loss)
    """
    head, hidden = copy.deepcopy(head), hidden.clone().requires_grad_()
    with autocast(dtype):
        loss, answers = way(hidden, head, target)
    (loss * scale).backward()
    gradients = [tensor.grad / scale for tensor in (hidden, head.weight, head.bias)]
    return loss.detach(), answers, gradients


def plainly(hidden, head, target):
    logits = head(hidden)
    return F.cross_entropy(logits.float(), target), logits.argmax(dim=1)


@pytest.fixture(params=[16, 4096])
def rows(request, monkeypatch):
    """Patches of a chunk: several chunks with a rest, or one."""
    monkeypatch.setattr(fused, "ROWS_IN_CACHE", request.param)


def test_cross_entropy_of_the_head_in_fp32(rows):
    plain, ours = (learned(way, *head_and_inputs(), None) for way in (plainly, linear_cross_entropy))
    assert float(ours[0]) == pytest.approx(float(plain[0]), rel=1e-6)
    assert torch.equal(ours[1], plain[1])
    assert all(far(*pair) < 1e-6 for pair in zip(ours[2], plain[2], strict=True))


@pytest.mark.parametrize(("dtype", "scale", "near"), [(BF16, 1.0, 0.01), (torch.float16, 2.0**14, 0.002)])
def test_cross_entropy_of_the_head_in_low_precision(dtype, scale, near, rows, monkeypatch):
    """As close to fp32 as the plain way is, also with a scaled loss and more patches
    than fp16 may sum up at once.
    """
    monkeypatch.setattr(fused, "FP16_ROWS", 20)
    exact = learned(plainly, *head_and_inputs(), None)
    plain, ours = (learned(way, *head_and_inputs(), dtype, scale) for way in (plainly, linear_cross_entropy))
    # the same logits, and fp32 from there on
    assert float(ours[0]) == pytest.approx(float(plain[0]), rel=1e-6)
    assert torch.equal(ours[1], plain[1])
    for mine, theirs, truth in zip(ours[2], plain[2], exact[2], strict=True):
        assert far(mine, truth) < min(near, 1.2 * far(theirs, truth))


def test_extreme_logits_have_a_loss_and_nan_has_none():
    head, hidden, target = head_and_inputs(patches=3)
    hidden *= 1e4
    loss, _, gradients = learned(linear_cross_entropy, head, hidden, target, None)
    assert float(loss) == pytest.approx(float(plainly(hidden, head, target)[0].detach()), rel=1e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    hidden[1, 0] = float("nan")
    assert torch.isnan(learned(linear_cross_entropy, head, hidden, target, None)[0])


def test_nothing_is_kept_for_each_patch_and_code():
    head, hidden, target = head_and_inputs(patches=300, width=8, codes=512)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        loss, _ = linear_cross_entropy(hidden.requires_grad_(), head, target)
    assert 0 < sum(kept) < 2 * (head.weight.numel() + hidden.numel())
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, head, target)[0], loss)


# ── Linear layers ──
@pytest.mark.parametrize(("width", "out"), [(24, 1100), (40, 40), (200, 24)])
def test_the_gradient_of_a_weight_is_the_plain_one(width, out):
    torch.manual_seed(0)
    x, gradient = torch.randn(60, width).to(BF16), torch.randn(60, out).to(BF16)
    mine = weight_gradient(gradient, x)
    assert mine.is_contiguous() and mine.dtype == BF16
    assert far(mine, gradient.double().t() @ x.double()) < 0.004  # one rounding


@pytest.mark.parametrize("dtype", [BF16, None])
def test_our_linear_layer_is_torchs(dtype, monkeypatch):
    torch.manual_seed(0)
    x, used = torch.randn(3, 20, 24), []
    ours, plain = CpuLinear(24, 40), nn.Linear(24, 40)
    plain.load_state_dict(ours.state_dict())
    apply = cpu_bf16.LinearOnCpu.apply
    monkeypatch.setattr(cpu_bf16.LinearOnCpu, "apply", lambda *given: used.append(1) or apply(*given))
    results = []
    for layer in (ours, plain):
        images = x.clone().requires_grad_()
        with autocast(dtype):
            out = layer(images)
        out.float().square().sum().backward()
        results.append((out, images.grad, layer.weight.grad, layer.bias.grad))
    assert len(used) == (dtype is not None)
    assert torch.equal(results[0][0], results[1][0])
    for mine, theirs in zip(results[0][1:], results[1][1:], strict=True):
        assert mine.dtype == theirs.dtype and mine.stride() == theirs.stride()
        assert far(mine, theirs) < 0.004 if dtype else torch.equal(mine, theirs)


def test_layers_swapped_in_for_a_cpu_learn_as_the_plain_ones():
    """In bf16: what differs is the order of sums. In fp32 nothing does."""
    torch.manual_seed(0)
    plain = modeling_finetune.create_model(
        "beit_demo_patch16_128", img_size=48, num_classes=5, use_rel_pos_bias=True
    )
    model, x, target = copy.deepcopy(plain), torch.rand(3, 3, 48, 48), torch.tensor([0, 3, 1])
    cpu_bf16.swap_in(model)
    recomputed = copy.deepcopy(model)
    recompute_blocks(recomputed)
    assert [*model.state_dict()] == [*plain.state_dict()]
    for one in (recomputed.train(), model.train(), plain.train()):
        with autocast(BF16):
            F.cross_entropy(one(x).float(), target).backward()
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), recomputed.parameters(), strict=True)
    )
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32 and mine.grad.stride() == mine.stride()
        assert far(mine.grad, theirs.grad) < 0.02, name
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))
        with autocast(BF16):
            assert far(model(x), plain(x)) < 0.02


def test_every_layer_of_a_block_is_swapped_and_kept_by_copies():
    model = modeling_finetune.create_model("beit_demo_patch16_128", num_classes=5)
    cpu_bf16.swap_in(model)
    block = copy.deepcopy(model).blocks[0]
    assert {type(layer) for layer in (block.mlp.fc1, block.mlp.fc2, block.attn.proj)} == {cpu_bf16.CpuLinear}
    assert (
        block.attn.attend is cpu_bf16.cpu_attention and type(model.patch_embed.proj) is cpu_bf16.CpuPatchConv
    )


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("of_bias", [None, 1, 5])
def test_attention_in_chunks_is_attention(images, of_bias):
    q, k, v = torch.randn(5, 2, 3, 8), torch.randn(5, 2, 7, 8), torch.randn(5, 2, 7, 8)
    bias = None if of_bias is None else torch.randn(of_bias, 2, 3, 7)
    chunks = cpu_bf16.attend_in_chunks(images, q, k, v, bias, 0.3, 0.0)
    assert far(chunks, fused_attention(q, k, v, bias, 0.3, 0.0)) < 1e-5


def test_scores_that_no_gradient_needs_are_bounded(monkeypatch):
    """In bf16 some images at a time; torch's way where one image has too many."""
    taken = []
    monkeypatch.setattr(cpu_bf16, "attend_in_chunks", lambda images, *_: taken.append(images))
    q = torch.randn(5, 2, 4, 8, dtype=BF16)
    for size in (2 * 2 * 4 * 4 * 3, 2 * 2 * 4 * 4 - 1):
        monkeypatch.setattr(cpu_bf16, "SCORES_IN_CACHE", size)
        with torch.no_grad():
            out = cpu_bf16.cpu_attention(q, q, q, None, 0.3, 0.0)
    assert taken == [3] and out.shape == q.shape
    with torch.no_grad():
        assert cpu_bf16.cpu_attention(*[q.float()] * 3, None, 0.3, 0.0).dtype == torch.float32
    assert taken == [3]


def test_patches_are_cut_as_the_convolution_cuts_them():
    embed = PatchEmbed((32, 48), 16, 5, 24)
    x = torch.rand(2, 5, 32, 48)
    with torch.no_grad():
        expected = embed(x)
    cpu_bf16.swap_in(embed)
    with autocast(BF16):
        assert far(embed(x).detach(), expected) < 0.01


def test_a_bias_is_read_row_by_row():
    table, index = torch.randn(3 * 3 + 3, 4), relative_position_index((2, 2))
    bias = gather_bias(table, index)
    assert bias.is_contiguous() and torch.equal(bias[2], table[:, 2][index])


# ── Frozen networks ──
def frozen():
    torch.manual_seed(0)
    tokenizer = modeling_vqkd.create_model(
        "vqkd_encoder_demo_decoder_1x128x4_hog", img_size=64, as_tokenizer=True
    )
    teachers = [build_teacher(f"timm:{name}", "random", 64) for name in ("test_vit", "test_resnet")]
    networks = [(tokenizer.encoder, lambda x: tokenizer.features(tokenizer.pre_process(x)))]
    return networks + [(teacher, teacher.targets) for teacher in teachers]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_weights_cast_once_give_the_same_bits(which, dtype):
    network, use = frozen()[which]
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), autocast(dtype):
        before = use(x)
        cast_frozen(network, dtype)
        assert torch.equal(use(x), before)
    types = {
        type(module): {p.dtype for p in module.parameters(recurse=False)} for module in network.modules()
    }
    assert types[nn.Conv2d] == {dtype}
    assert all(dtypes <= {torch.float32} for kind, dtypes in types.items() if "Norm" in kind.__name__)


def test_in_fp32_nothing_is_cast():
    network, _ = frozen()[0]
    cast_frozen(network, None)
    assert {p.dtype for p in network.parameters()} == {torch.float32}


# ── The optimizer's step ──
@pytest.mark.parametrize("clip_grad", [None, 0.5, 1e6])
def test_gradients_are_clipped_inside_fused_adamw_as_before_it(clip_grad):
    torch.manual_seed(0)
    ours = modeling_finetune.create_model("beit_demo_patch16_128", img_size=32, num_classes=3)
    plain = copy.deepcopy(ours)
    norms = []
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) for model in (ours, plain)]
    for seed in range(3):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        for model in (ours, plain):
            model(x).square().sum().backward()
        state = SimpleNamespace(
            model=ours, optimizer=optimizers[0], scaler=scaler, parameters=list(ours.parameters())
        )
        norms.append(float(engine.take_step(state, clip_grad)))
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), clip_grad or float("inf"))))
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert norms[::2] == pytest.approx(norms[1::2], rel=1e-5)
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5), name
    moments = [
        torch.cat([s["exp_avg"].flatten() for s in optimizer.state.values()]) for optimizer in optimizers
    ]
    assert far(*moments) < 1e-4
