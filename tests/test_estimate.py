"""estimate.py: figures of the real step on tensors without data. Exact are parameters
and what is exchanged; memory is compared with what real steps allocate.
"""

import json
import os
import shlex
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from many_processes import run_ranks
from refusals import refused
from source_files import ROOT
from tiny_runs import STUDENT, TOKENIZER, as_flags, finetuning_flags, photos
from torch import nn
from torch.distributed.fsdp import FSDPModule

import engine
import estimate
from checkpoint_io.checkpoints import count_bytes
from estimation import tracker as kinds
from estimation.measurement import pretended_run
from estimation.pretending import pretend
from estimation.report import CANDIDATES, find_largest_batch
from estimation.tracker import Memory, local
from layers.attention import fused_attention
from layers.linear_cross_entropy import linear_cross_entropy
from layers.meant_device import is_cpu, meant_for
from runtime.cards import CARDS, Card, find_card, needed
from runtime.terminal import silence

sys.path.insert(0, str(ROOT / "scripts"))
import measure_estimate

GIB, MIB = 2**30, 2**20
V100, A100 = find_card("V100-32GB"), find_card("A100-80GB")
PRETRAIN, VQKD = "run_beitv2_pretraining.py", "run_vqkd_training.py"
FINETUNE, SEGMENT = "run_class_finetuning.py", "run_segmentation_finetuning.py"
BASE, LARGE = (f"beit_{size}_patch16_224_8k_vocab_cls_pt" for size in ("base", "large"))
DEMO = {
    PRETRAIN: as_flags(
        model=STUDENT, input_size=128, early_layers=4, tokenizer_model=TOKENIZER, codebook_size=64
    ),
    VQKD: as_flags(model=TOKENIZER, input_size=128, teacher_input_size=128, codebook_n_emd=64),
    FINETUNE: as_flags(model="beit_demo_patch16_128", input_size=128, nb_classes=7),
    SEGMENT: as_flags(model="upernet_beit_demo_patch16", input_size=64, nb_classes=5),
}
KEYS = {
    *"""parameters peak_bytes peak_by_kind fits largest_batch_size gflop_per_image
    exchanged_bytes_per_step images_per_second hours price disk_bytes""".split()
}
can_shard_on_cpu = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"),
    reason="this torch's gloo cannot average gradients",
)


def measured(script, *words, gpus=1, card=V100):
    entry = estimate.ENTRIES[script]
    args = entry.parse([*DEMO.get(script, []), *map(str, words)])
    args = args.replace(amp_dtype=card.dtype if args.amp_dtype == "auto" else args.amp_dtype)
    with silence(), pretended_run(entry, args, 1000, card, gpus) as run:
        return run.measure()


def estimated(tmp_path, script, *words):
    file = tmp_path / "estimate.json"
    estimate.main([script, *DEMO.get(script, []), *map(str, words), "--output", str(file)])
    return json.loads(file.read_text())


BASE_FLAGS = """--num_mask_patches 75 --tokenizer_model vqkd_encoder_base_decoder_3x768x12_clip
    --tokenizer_weight none.pth --batch_size 128 --amp_dtype fp16 --gpus 16 --gpu V100-32GB
    --images 1281167 --epochs 300""".split()


def published_lines():
    """The two commands of the published guide, as words; `&` does not end them."""
    text = (ROOT / "tests/golden/beitv2_pretraining_guide.txt").read_text()
    commands = [part.split("```")[0].replace("\\\n", " ") for part in text.split("```bash")[1:]]
    return [shlex.split(command) for command in commands]


# ── The command ──


@pytest.mark.parametrize(
    "script", [name if name == VQKD else pytest.param(name, marks=pytest.mark.slow) for name in DEMO]
)
def test_every_stage_is_estimated(script, tmp_path, capsys):
    """With neither images nor weights nor --data_path."""
    found = estimated(tmp_path, script, *as_flags(batch_size=4, gpus=2, gpu="T4-16GB", price=2, images=1000))
    assert found.keys() >= KEYS
    assert found["fits"]
    assert found["exchanged_bytes_per_step"] == 4 * found["parameters"]  # fp32 gradients, once each
    assert sum(found["peak_by_kind"].values()) == found["peak_bytes"]
    assert found["price"] == pytest.approx(2 * 2 * found["hours"])
    assert found["hours"] == pytest.approx(
        found["steps"] * found["images_per_step"] / found["images_per_second"] / 3600
    )
    others = {row["flags"]: row for row in found["others"]}
    assert others["--grad_checkpointing"]["gflop_per_image"] > found["gflop_per_image"]
    assert ("--fsdp" in others) == (script in (PRETRAIN, FINETUNE))
    said = capsys.readouterr().out
    assert "it fits" in said and "assumed, not measured" in said
    assert ("not measured for this stage" in said) == (script in (FINETUNE, SEGMENT))


@pytest.mark.slow
@pytest.mark.parametrize(("line", "peak", "gflop", "mib"), [(0, 12.2, 153.7, 405), (1, 12.2, 427, 1285)])
def test_published_lines_fit_their_gpus(line, peak, gflop, mib, tmp_path, capsys):
    """Word for word, launcher included; figures of a prototype."""
    file = tmp_path / "published.json"
    estimate.main([*published_lines()[line], "--output", str(file)])
    found = json.loads(file.read_text())
    assert (found["gpu"], found["gpus"], found["fits"]) == ("V100-32GB", 16 if line == 0 else 64, True)
    assert found["images_per_step"] == 2048
    assert found["peak_bytes"] / GIB == pytest.approx(peak, rel=0.1)
    assert found["gflop_per_image"] == pytest.approx(gflop, rel=0.1)
    assert round(found["exchanged_bytes_per_step"] / MIB) in (mib, mib - 1)
    assert "it fits" in capsys.readouterr().out


@pytest.mark.slow
def test_the_base_run_beside_known_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DEMO, PRETRAIN, [])
    found = estimated(tmp_path, PRETRAIN, "--model", BASE, *BASE_FLAGS)
    assert found["parameters"] == pytest.approx(106.1e6, rel=1e-3)
    assert found["exchanged_bytes_per_step"] == 4 * found["parameters"]
    assert found["peak_bytes"] / GIB == pytest.approx(12.2, rel=0.1)
    assert found["gflop_per_image"] == pytest.approx(153.7, rel=0.02)
    assert found["fits"]
    assert "it fits" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "gpus", "card", "peak"),
    [
        (as_flags(model=BASE, batch_size=256), 16, A100, 22.3),
        (as_flags(model=LARGE, early_layers=21, batch_size=64), 64, V100, 18.5),
        (
            as_flags(
                model="beit_huge_patch14_224_8k_vocab", batch_size=128, fsdp=True, grad_checkpointing=True
            ),
            8,
            A100,
            9.0,
        ),
    ],
)
def test_memory_is_near_that_of_a_prototype(words, gpus, card, peak, monkeypatch):
    monkeypatch.setitem(DEMO, PRETRAIN, [])
    assert measured(PRETRAIN, *words, gpus=gpus, card=card).peak / GIB == pytest.approx(peak, rel=0.1)


def test_a_line_that_the_shell_has_cut_is_warned_of(tmp_path, capsys):
    url = "https://example.com/vqkd.pth?sv=2021-10-04"
    estimated(tmp_path, PRETRAIN, "--tokenizer_weight", url, "--batch_size", 4, "--images", 1000)
    assert "was cut at its first '&'" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        as_flags(in_chans=4, image_range="auto", mean_std="auto"),
        as_flags(init_from="nowhere.pth"),
        as_flags(schedule="wsd", cooldown_epochs=5),
        as_flags(model="beit_demo_patch16_128_8k_vocab", target="pixels"),
        as_flags(model="beit_demo_patch16_128_8k_vocab", tokenizer_model="dall-e", codebook_size=8192),
    ],
)
def test_variants_of_pretraining_are_estimated(more, tmp_path, capsys):
    """With no file that they name, and no warning about what it would say."""
    found = estimated(tmp_path, PRETRAIN, *more, *as_flags(batch_size=8, images=1000))
    assert found["fits"] and found["steps"] == 300 * 125
    assert "was trained with" not in capsys.readouterr().out


@pytest.mark.slow
def test_own_flags_stand_anywhere_and_config_is_the_scripts(tmp_path, capsys):
    file = tmp_path / "flags.json"
    file.write_text(json.dumps({"batch_size": 6, "nb_classes": 7}))
    words = ["--gpus", "2", "torchrun", "--nproc-per-node=8", FINETUNE, "--config", str(file)]
    words += [*DEMO[FINETUNE], "--gpu", "T4-16GB", "--images=100", "--output", str(tmp_path / "e.json")]
    estimate.main(words)
    found = json.loads((tmp_path / "e.json").read_text())
    assert (found["gpus"], found["gpu"], found["images_per_step"]) == (2, "T4-16GB", 12)


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ("", 1),
        ("python", 1),
        ("torchrun --nnodes=2 --nproc-per-node 4", 8),
        ("OMP_NUM_THREADS=1 /usr/bin/python3.11", 1),
        ("-m torch.distributed.launch --nproc_per_node=2", 2),
        ("python -m torch.distributed.launch --nnodes 4 --node_rank {0, 1, 2, 3} --nproc_per_node=16", 64),
    ],
)
def test_a_launcher_says_how_many_gpus(launcher, processes):
    assert estimate.count_processes(launcher.split()) == processes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "which run? Name its script"),
        (["run_linear_eval.py"], "unknown training script 'run_linear_eval.py'"),
        ([FINETUNE, "--gpu", "V100"], "unknown --gpu 'V100'; did you mean V100-"),
        ([FINETUNE, "--mfu", "2"], "argument --mfu: '2' is not a number above 0"),
        ([FINETUNE, "--eval", "--resume", "x.pth"], "--eval: only training is estimated"),
        ([VQKD, "--train_pixel_decoder", "--tokenizer_weight", "x.pth"], "--train_pixel_decoder: only"),
        ([FINETUNE, "--model", "beit_bas"], "unknown fine-tuning model 'beit_bas'"),
        (["torchrun", "--nproc_per_node=auto", FINETUNE], "give --gpus"),
        (["accelerate", "launch", FINETUNE], "how many processes accelerate starts is not known here: give"),
        (["--batch_size", "64", FINETUNE], "--batch_size stands before run_class_finetuning.py"),
        (["--config", "f.json", FINETUNE], "--config stands before run_class_finetuning.py"),
        ([FINETUNE, "--output", "no/such/e.json"], "--output no/such/e.json: there is no such folder"),
        ([PRETRAIN, *DEMO[PRETRAIN], "--gpu", "abacus"], "abacus"),
        ([PRETRAIN, *DEMO[PRETRAIN], "--gpus", "0"], "0"),
        ([FINETUNE, *DEMO[FINETUNE], "--gpus", "2", "--fsdp", "--compile"], "do not go together"),
        ([PRETRAIN, *DEMO[PRETRAIN], "--data_set", "no such"], "no such"),
        (["model_zoo.py"], "model_zoo.py"),
    ],
)
def test_what_cannot_be_estimated_is_told_in_a_sentence(words, sentence, capsys):
    assert sentence in refused(estimate.main, words, capsys)


def test_codes_of_a_crop_cycle_take_disk():
    """2 bytes a patch, 4 above 65,536 codes, and 4 a row; none of pixels."""
    rows = 3 * 1000
    sizes = {(): 64 * 2 + 4, ("--codebook_size", 65537): 64 * 4 + 4, ("--target", "pixels"): 0}
    for more, size in sizes.items():
        found = measured(PRETRAIN, *as_flags(batch_size=2, crop_cycle=3), *more).codes
        assert size * rows <= found < size * rows + 3 * 200  # with a header in each file
    assert measured(FINETUNE, "--batch_size", 2).codes == 0


# ── Memory ──


@pytest.mark.slow
@pytest.mark.parametrize("script", measure_estimate.STAGES)
def test_memory_is_what_a_real_step_allocates(script, tmp_path):
    """docs/lab/estimate.md has more rows."""
    rows = list(measure_estimate.compare(tmp_path, [script], ["demo"]))
    assert len(rows) == 4
    for row in rows:
        assert abs(row.error) < 0.03, row


def shares_of(run):
    """Bytes of this process's weights, gradients and moments after a backward pass."""
    state = run.state
    held = {
        "parameters": list(state.model.parameters()),
        "gradients": [parameter.grad for parameter in state.model.parameters()],
        "moments": [value for moments in state.optimizer.state.values() for value in moments.values()],
    }
    return {kind: count_bytes([local(value) for value in values]) for kind, values in held.items()}


def real_shares(rank, world_size, words):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    trainer = estimate.run_class_finetuning.build(estimate.run_class_finetuning.parse_flags(words))
    return step_and_count(trainer, next(iter(trainer.data.loader)))


def step_and_count(trainer, batch):
    """The gradients of the second step are there, and the moments of the first."""
    state = trainer.state
    state.runner.train()
    for _ in range(2):
        transform = trainer.data.loader.dataset.device_transform
        engine.accumulate_gradients(state, trainer.stage, [batch], trainer.run, transform)
        found = shares_of(trainer)
        engine.take_step(state, None)
    return found


@pytest.mark.slow
@can_shard_on_cpu
def test_shares_of_fsdp_are_exact(tmp_path):
    words = finetuning_flags(photos(tmp_path / "photos"), "", "--fsdp", "--disable_eval_during_finetuning")
    words = [str(word) for word in [*words, "--nb_classes", "2"]]
    real = run_ranks(real_shares, 2, words)
    entry = estimate.ENTRIES[FINETUNE]
    with silence(), pretended_run(entry, entry.module.parse_flags(words), 16, None, 2) as run:
        predicted = step_and_count(run.trainer, run.batch(4))
    assert predicted == real[0]
    assert predicted["parameters"] < 0.6 * 4 * sum(p.numel() for p in run.trainer.state.model.parameters())


@pytest.mark.slow
def test_more_of_what_saves_memory_saves_it():
    plain = measured(PRETRAIN, "--batch_size", 64, gpus=4)
    kept = measured(PRETRAIN, "--batch_size", 64, "--grad_checkpointing", gpus=4)
    sharded = measured(PRETRAIN, "--batch_size", 64, "--fsdp", gpus=4)
    halves = measured(PRETRAIN, "--batch_size", 32, "--update_freq", 2, gpus=4)
    assert max(kept.peak, sharded.peak, halves.peak) < plain.peak
    assert kept.flops > plain.flops == sharded.flops == halves.flops
    assert sharded.by_kind["parameters"] < 0.3 * plain.by_kind["parameters"]
    assert "gathered_shards" in sharded.by_kind and "gathered_shards" not in plain.by_kind
    assert (halves.images, halves.exchanged, halves.steps) == (plain.images, plain.exchanged, plain.steps)


@pytest.mark.slow
def test_fsdp_gathers_matrices_in_half_precision():
    """Twice a step, 2 bytes instead of 4; gradients stay in fp32."""
    flags = as_flags(batch_size=4, fsdp=True)
    single, *halves = (
        measured(PRETRAIN, *flags, "--amp_dtype", dtype, gpus=4, card=card).exchanged
        for card, dtype in ((A100, "fp32"), (A100, "bf16"), (V100, "fp16"))
    )
    blocks, matrices = 6 + 2, 12 * 128**2  # with those of the CLS head; of a block
    assert halves == [single - 2 * 2 * blocks * matrices] * 2


def test_schedules_of_long_runs_are_not_computed(monkeypatch):
    """A published line on one GPU has 16 million steps."""
    monkeypatch.setattr("schedules.cosine_scheduler", None)
    assert measured(FINETUNE, *as_flags(batch_size=4, epochs=10**5)).steps == 250 * 10**5


def test_kinds_have_the_sizes_of_their_tensors():
    """Of fp32 numbers, each tensor rounded up to 512 bytes."""
    step = measured(FINETUNE, *as_flags(batch_size=4, model_ema=True))
    weights = 4 * step.parameters
    for kind, size in ((kinds.AVERAGE, weights), (kinds.MOMENTS, 2 * weights), (kinds.PARAMETERS, weights)):
        assert size <= step.by_kind[kind] < 1.1 * size


def test_the_largest_batch_fits_and_the_next_does_not():
    entry = estimate.ENTRIES[FINETUNE]
    args = entry.parse([*DEMO[FINETUNE], "--batch_size", "16", "--amp_dtype", "fp32"])
    small = Card("small", needed(300 * MIB), 70, 125, 15.7, mfu=0.3)
    with silence(), pretended_run(entry, args, 1000, small, 1) as run:
        found = find_largest_batch(run, small, run.measure())
        following = CANDIDATES[CANDIDATES.index(found) + 1]
        assert small.holds(run.measure(found).peak) and not small.holds(run.measure(following).peak)


def test_memory_counts_storages_while_they_live():
    memory = Memory(granularity=512)
    first, second = torch.zeros(200), torch.zeros(100)
    for tensor in (first, first.view(2, 100), second):  # a view is no memory of its own
        memory.add(tensor)
    memory.mark(kinds.MOMENTS, [first])
    del first, tensor
    memory.add(third := torch.zeros(1))
    memory.add(torch.zeros(10**6, device="meta"))
    assert memory.peak() == (1536, {kinds.MOMENTS: 1024, kinds.ACTIVATIONS: 512})
    assert memory.peak(since=3)[0] == 1024
    assert len(third) == 1


# ── The card's way of computing ──


def attention_memory(card, dtype, bias):
    """Bytes that forward and backward of attention hold at once, beside its inputs."""
    with pretend(card, 1) as tracker:
        q, k, v = (torch.zeros(8, 4, 800, 32, dtype=dtype, requires_grad=True) for _ in range(3))
        mask = torch.zeros(1, 4, 800, 800, requires_grad=True) if bias else None
        before = tracker.memory.peak()[0]
        fused_attention(q, k, v, mask, 1.0, 0.0).sum().backward()
        assert q.grad.shape == q.shape and (mask is None or mask.grad.shape == mask.shape)
        return tracker.memory.peak()[0] - before, tracker.flops


def test_attention_keeps_no_matrix_of_all_pairs():
    pairs = 8 * 4 * 800 * 800
    for card, dtype in ((V100, torch.float16), (V100, torch.float32), (A100, torch.bfloat16)):
        held, flops = attention_memory(card, dtype, bias=False)
        assert held < pairs * dtype.itemsize
        assert flops == 6 * 2 * pairs * 32  # two products forward, four backward
    with_bias, _ = attention_memory(A100, torch.bfloat16, bias=True)
    assert with_bias > pairs * 2  # the gradient of the bias is of every image


def test_code_goes_the_way_of_the_device_that_is_meant():
    cpu = torch.device("cpu")
    assert is_cpu(cpu) and not is_cpu(torch.device("meta"))
    with meant_for("cuda"):
        assert not is_cpu(cpu)
        head, hidden = nn.Linear(8, 16), torch.randn(600, 8, requires_grad=True)
        loss, _ = linear_cross_entropy(hidden, head, torch.zeros(600, dtype=torch.int64))
    assert is_cpu(cpu)
    expected = F.cross_entropy(head(hidden), torch.zeros(600, dtype=torch.int64))
    assert torch.allclose(loss, expected, atol=1e-6)


def test_nothing_of_an_estimate_remains():
    before = F.scaled_dot_product_attention, nn.init.trunc_normal_, torch.UntypedStorage.resize_
    measured(PRETRAIN, "--batch_size", 4, "--fsdp", gpus=2)
    with pytest.raises(ZeroDivisionError), pretend(V100, 2):
        raise ZeroDivisionError
    assert (F.scaled_dot_product_attention, nn.init.trunc_normal_, torch.UntypedStorage.resize_) == before
    assert not dist.is_initialized() and torch.is_autocast_cache_enabled() and "RANK" not in os.environ
    assert torch.ones(2).sum().item() == 2


def test_cards_are_sensible():
    for name, card in CARDS.items():
        assert name == card.name and 0 < card.mfu < 1 and card.tflops >= card.tflops_fp32
        assert card.memory < int(name.split("-")[1][:-2]) * GIB  # a name has round or decimal gigabytes
    assert V100.dtype == "fp16" and A100.dtype == "bf16"
    assert V100.peak_flops("bf16") == V100.peak_flops("fp32") < V100.peak_flops("fp16")
