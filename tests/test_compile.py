"""--grad_checkpointing and --compile change how a step is computed, not what."""

import copy

import pytest
import torch
import torch._dynamo
from refusals import refused
from tiny_runs import STUDENT, checkpoint, finetuning_flags, log_lines, pretraining_flags, vqkd_flags
from torch._dynamo.utils import counters

import modeling_finetune
import modeling_pretrain
import modeling_vqkd
import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
import vit_backbone
from runtime import compilation
from vit_backbone import recompute_blocks

STAGES = {
    "pretrain": (run_beitv2_pretraining, pretraining_flags),
    "finetune": (run_class_finetuning, finetuning_flags),
    "vqkd": (run_vqkd_training, vqkd_flags),
}


@pytest.fixture
def graphs(monkeypatch):
    """Traced and differentiated as ever, but not translated to C++, which takes
    minutes: breaks and recompilations show.
    """
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
    torch._dynamo.config.optimize_ddp = True


def student(**settings):
    torch.manual_seed(0)
    model = modeling_pretrain.create_model(
        STUDENT,
        img_size=64,
        vocab_size=16,
        drop_path_rate=0.3,
        drop_rate=0.1,
        attn_drop_rate=0.1,
        init_values=0.1,
        use_shared_rel_pos_bias=True,
        early_layers=4,
        head_layers=1,
        **settings,
    )
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[:, :6] = True
    return model.train(), (torch.randn(4, 3, 64, 64), mask)


def step(model, inputs):
    """(loss, gradients, bytes kept for the backward pass)"""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(1)  # of dropped paths and values
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(*inputs)
        loss = sum(
            output.square().mean() for output in (outputs if isinstance(outputs, tuple) else (outputs,))
        )
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters()}, sum(kept.values())


def classifier():
    torch.manual_seed(0)
    model = modeling_finetune.create_model(
        "beit_demo_patch16_128",
        img_size=64,
        num_classes=5,
        drop_path_rate=0.3,
        use_rel_pos_bias=True,
        init_values=0.1,
    )
    return model.train(), (torch.randn(4, 3, 64, 64),)


@pytest.mark.parametrize("build", [student, classifier])
def test_recomputed_blocks_give_equal_gradients_in_less_memory(build):
    model, inputs = build()
    loss, gradients, kept = step(model, inputs)
    recompute_blocks(model)
    again, same, less = step(model, inputs)
    assert again == loss
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    assert less < kept / 3


def test_recomputed_blocks_in_evaluation_are_plain(monkeypatch):
    model, inputs = classifier()
    expected = model.eval()(*inputs)
    recompute_blocks(model)
    monkeypatch.setattr("vit_backbone.checkpoint", None)
    assert torch.equal(model(*inputs), expected)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_the_same_with_grad_checkpointing(
    stage, ten_photos, tokenizer_weight, tmp_path, monkeypatch
):
    calls = []
    original = vit_backbone.checkpoint
    monkeypatch.setattr(
        "vit_backbone.checkpoint", lambda *args, **how: calls.append(1) or original(*args, **how)
    )
    script, flags = STAGES[stage]
    more = [tokenizer_weight] if stage == "pretrain" else []
    drop = [] if stage == "vqkd" else ["--drop_path", "0.2"]
    script.main(flags(ten_photos, tmp_path / "plain", *more, *drop))
    assert not calls
    script.main(flags(ten_photos, tmp_path / "less", *more, *drop, "--grad_checkpointing"))
    assert calls
    losses = [[line["train_loss"] for line in log_lines(tmp_path / out)] for out in ("plain", "less")]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("build", [student, classifier])
def test_each_part_is_one_graph_and_is_compiled_once(build, recompute, graphs):
    model, inputs = build()
    if recompute:
        recompute_blocks(model)
    names = list(model.state_dict())
    loss, gradients, _ = step(copy.deepcopy(model), inputs)
    parts = compilation.compile_networks(4, model)
    for _ in range(3):
        again, same, _ = step(model, inputs)
        with torch.no_grad():
            model.eval()(*(part[:3] for part in inputs))  # the rest of an evaluation
            model(*inputs)
        model.train()
    assert again == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, same[name], atol=1e-6), name
    assert graphs["stats"]["unique_graphs"] == parts == (2 if build is student else 1)
    assert not graphs["graph_break"]
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_a_frozen_tokenizer_is_compiled_for_whole_batches(graphs):
    torch.manual_seed(0)
    model = modeling_vqkd.create_model(
        "vqkd_encoder_demo_decoder_1x128x4_hog", img_size=32, n_code=16, code_dim=8, as_tokenizer=True
    )
    images = torch.rand(4, 3, 32, 32)
    expected = model.get_codebook_indices(images)
    compilation.compile_networks(4, model)
    for count in (4, 3, 4, 1, 4):
        assert torch.equal(model.get_codebook_indices(images[:count]), expected[:count])
    assert graphs["stats"]["unique_graphs"] == 1
    assert not graphs["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_compiled_runs_follow_the_curve_and_save_plain_weights(
    stage, ten_photos, tokenizer_weight, tmp_path, graphs
):
    script, flags = STAGES[stage]
    more = [tokenizer_weight] if stage == "pretrain" else []
    more += ["--eval_data_path", str(ten_photos), "--save_ckpt_freq", "1"] + (
        ["--model_ema"] if stage == "finetune" else []
    )
    script.main(flags(ten_photos, tmp_path / "plain", *more))
    assert not graphs["stats"]
    script.main(flags(ten_photos, tmp_path / "compiled", *more, "--compile"))
    compiled_graphs = graphs["stats"]["unique_graphs"]
    # none again in the second epoch
    assert compiled_graphs == {"pretrain": 3, "finetune": 1, "vqkd": 3}[stage]
    assert not graphs["graph_break"]
    for one, two in zip(log_lines(tmp_path / "plain"), log_lines(tmp_path / "compiled"), strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-3)
        assert one["test_loss"] == pytest.approx(two["test_loss"], rel=1e-3)
    files = [checkpoint(tmp_path / out / "checkpoint.pth") for out in ("plain", "compiled")]
    assert files[0]["model"].keys() == files[1]["model"].keys()
    # and a compiled run goes on from its middle, bit for bit
    first = ["--resume", str(tmp_path / "compiled/checkpoint-0.pth"), "--compile"]
    script.main(flags(ten_photos, tmp_path / "resumed", *more, *first))
    again = checkpoint(tmp_path / "resumed/checkpoint.pth")["model"]
    assert all(torch.equal(value, again[name]) for name, value in files[1]["model"].items())


def test_without_a_compiler_one_sentence_says_so(ten_photos, tokenizer_weight, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "--compile on a CPU needs a C++ compiler" in refused(
        run_beitv2_pretraining.main,
        pretraining_flags(ten_photos, tmp_path, tokenizer_weight, "--compile"),
        capsys,
    )
