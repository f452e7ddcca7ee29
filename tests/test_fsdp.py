"""--fsdp: two gloo processes that hold a half each end where DDP and one process end,
and write the same checkpoints.
"""

import json
import math
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from many_processes import run_ranks
from refusals import user_reads
from timm.utils import ModelEmaV3
from tiny_runs import (
    MeanSquare,
    as_flags,
    assert_same_weights,
    checkpoint,
    finetuning_flags,
    log_lines,
    photos,
    pretraining_flags,
    tokenizer,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import modeling_finetune
import optim_factory
import run_beitv2_pretraining
import run_checkpoints
import run_class_finetuning
import run_state
from checkpoint_io.checkpoints import count_bytes
from errors import UserError
from runtime import distributed, fsdp
from runtime.device import Precision
from runtime.distributed import Launch
from vit_backbone import Block, recompute_blocks

on_cpu = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"),
    reason="this torch's gloo cannot average gradients",
)
CPU = torch.device("cpu")

# ── Whole runs: the same command lines with and without the flag ──


def lines_of(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Name of a run -> script and flags of two processes. 16 images, 9 to evaluate on:
    one rank has a batch more.
    """
    train, uneven, codes = folder / "photos/train", folder / "photos/val", folder / "tokenizer.pth"
    looking = ["--eval_data_path", str(uneven), "--knn_freq", "1", "--knn_data_path", str(folder / "photos")]
    looking += ["--drop_path", "0", "--clip_grad", "3", "--image_freq", "1", "--health_freq", "1"]
    drawing = [
        *as_flags(eval_data_path=uneven, drop_path=0.1, mixup=0.8, model_ema=True, model_ema_decay=True),
    ]
    drawing += [
        "0.5",
        *as_flags(update_freq=2, grad_checkpointing=True, clip_grad=1, save_ckpt_steps=1),
    ]
    drawing += ["--keep_ckpts", "9", "--batch_size", "2"]

    def pretrain(out, *more):
        return "pretrain", pretraining_flags(train, folder / out, codes, *more)

    def tune(out, *more):
        return "finetune", finetuning_flags(train, folder / out, *drawing, *more)

    middle = str(folder / "tuned/checkpoint-step3.pth")  # of the second epoch's two steps
    return {
        "pretrained_ddp": pretrain("pretrained_ddp", *looking),
        "pretrained": pretrain("pretrained", *looking, "--fsdp"),
        "tuned_ddp": tune("tuned_ddp"),
        "tuned": tune("tuned", "--fsdp"),
        "resumed": tune("resumed", "--fsdp", "--resume", middle),
        "resumed_by_ddp": tune("resumed_by_ddp", "--resume", middle),
        "bad_ddp": pretrain("bad_ddp", "--drop_path", "0"),
        "bad": pretrain("bad", "--drop_path", "0", "--fsdp"),
        "bad_sgd": pretrain("bad_sgd", "--drop_path", "0", "--fsdp", "--opt", "sgd"),
        "bad_fp16_ddp": pretrain("bad_fp16_ddp", "--drop_path", "0", "--amp_dtype", "fp16"),
        "bad_fp16": pretrain("bad_fp16", "--drop_path", "0", "--fsdp", "--amp_dtype", "fp16"),
    }


def exploding_on_rank_1(rank):
    """The second step's loss is infinite, on one rank."""
    original, seen = run_beitv2_pretraining.PretrainingStage.step, []

    def step(self, model, batch):
        loss, logs = original(self, model, batch)
        seen.append(1)
        return (loss * math.inf if rank == 1 and len(seen) == 2 else loss), logs

    return mock.patch.object(run_beitv2_pretraining.PretrainingStage, "step", step)


def all_runs(rank, world_size, folder):
    mains = {"pretrain": run_beitv2_pretraining.main, "finetune": run_class_finetuning.main}
    for name, (script, flags) in lines_of(folder).items():
        environment = mock.patch.dict("os.environ", {"RANK": str(rank), "WORLD_SIZE": str(world_size)})
        one_group = mock.patch.object(distributed, "stop")  # for all these runs
        with environment, one_group, exploding_on_rank_1(rank if name.startswith("bad") else -1):
            mains[script](flags)
    result = trained(rank, world_size, folder)
    result["reads"] = {
        opt: reads_of_a_step(rank, world_size, folder, opt) for opt in ("adamw", "adam", "sgd")
    }
    result["gathers"] = {
        name: [gathered_in(dtype, own, rank) for own in (None, dtype)] for name, dtype in HALVES.items()
    }
    if rank == 0:
        with mock.patch.object(distributed, "world_size", return_value=1):  # as if there were no group
            passed_on(0, 1, folder, "a.pth", "b.pth")
    distributed.barrier()
    passed_on(rank, world_size, folder, "b.pth", "c.pth")
    return result


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory):
    """Where the runs are, and what `trained` returned on each rank: processes are
    started once, which takes the most time.
    """
    folder = tmp_path_factory.mktemp("fsdp")
    photos(folder / "photos/train")
    photos(folder / "photos/val", per_class=5)
    (folder / "photos/val/b/0.jpg").unlink()
    tokenizer(folder / "tokenizer.pth")
    return folder, run_ranks(all_runs, 2, folder)


@pytest.fixture(scope="module")
def runs(both_ranks):
    return both_ranks[0]


def assert_near(one: Path, two: Path, tolerance: float) -> None:
    for entry in ("model", "model_ema"):
        first, second = (checkpoint(path / "checkpoint.pth").get(entry, {}) for path in (one, two))
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert value.shape == second[name].shape
            assert torch.allclose(value, second[name], atol=tolerance), (
                entry,
                name,
                (value - second[name]).abs().max(),
            )


def assert_same_moments(one: dict, two: dict) -> None:
    """What the gradients of half precision add up to. Not the weights: Adam's first
    step is the gradient's sign times --lr, and a gradient that one sum rounds to 0 is
    not 0 in the other's order.
    """
    first, second = one["optimizer"]["state"], two["optimizer"]["state"]
    assert first.keys() == second.keys()
    for index, moments in first.items():
        assert moments["step"] == second[index]["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            expected = second[index][name]
            # 0.001 was seen
            assert (moments[name] - expected).norm() <= 0.02 * expected.norm(), (index, name)


def assert_same_curves(one: Path, two: Path) -> None:
    for first, second in zip(log_lines(one), log_lines(two), strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"seconds"}:
            assert first[name] == pytest.approx(second[name], rel=1e-4), name


@pytest.mark.slow
@on_cpu
@pytest.mark.parametrize("run", ["pretrained", "tuned"])
def test_shares_end_where_whole_copies_end(run, runs):
    """Clipping, layer decay, accumulation, recomputed blocks, moving average;
    evaluation, k-NN and pictures between.
    """
    assert_same_curves(runs / run, runs / f"{run}_ddp")
    assert_near(runs / run, runs / f"{run}_ddp", 2e-6)
    shares, copies = (checkpoint(runs / name / "checkpoint.pth")["optimizer"] for name in (run, f"{run}_ddp"))
    assert shares["param_groups"] == copies["param_groups"]
    assert shares["state"].keys() == copies["state"].keys()


@pytest.mark.slow
@on_cpu
def test_shares_end_where_one_process_ends(runs, tmp_path):
    _, flags = lines_of(runs)["pretrained_ddp"]
    run_beitv2_pretraining.main([*flags, "--batch_size", "8", "--output_dir", str(tmp_path)])
    assert_same_curves(runs / "pretrained", tmp_path)
    assert_near(runs / "pretrained", tmp_path, 2e-5)


@pytest.mark.slow
@on_cpu
def test_uneven_evaluation_counts_each_image_once_with_pictures(runs):
    assert all(line["test_images"] == line["test_ema_images"] == 9 for line in log_lines(runs / "tuned"))
    for line in log_lines(runs / "pretrained"):
        assert {"test_knn_acc1", "health_mlm_margin", "health_attention_distance_block_6"} <= line.keys()
    for name in ("masked_tokens-0000.png", "masked_tokens-0001.png"):
        pictures = [runs / run / "pictures" / name for run in ("pretrained", "pretrained_ddp")]
        assert pictures[0].read_bytes() == pictures[1].read_bytes()


@pytest.mark.slow
@on_cpu
def test_a_run_stopped_within_an_epoch_resumes_bit_for_bit(runs):
    assert checkpoint(runs / "tuned/checkpoint-step3.pth")["next"]["samples"] > 0
    assert_same_weights(runs / "tuned/checkpoint.pth", runs / "resumed/checkpoint.pth")
    moments = [
        checkpoint(runs / name / "checkpoint.pth")["optimizer"]["state"] for name in ("tuned", "resumed")
    ]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])


@pytest.mark.slow
@on_cpu
def test_a_run_goes_on_without_the_flag_and_with_fewer_processes(runs, tmp_path):
    assert_near(runs / "tuned", runs / "resumed_by_ddp", 2e-6)
    _, flags = lines_of(runs)["resumed_by_ddp"]
    run_class_finetuning.main([*flags, "--output_dir", str(tmp_path)])
    assert [line["epoch"] for line in log_lines(tmp_path)] == [1]


@pytest.mark.slow
@on_cpu
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(runs):
    assert_near(runs / "bad", runs / "bad_ddp", 2e-6)
    files = {
        run: checkpoint(runs / run / "checkpoint.pth")
        for run in ("bad", "bad_sgd", "bad_fp16", "bad_fp16_ddp")
    }
    assert all(value.isfinite().all() for content in files.values() for value in content["model"].values())
    # of 4
    assert {float(moments["step"]) for moments in files["bad"]["optimizer"]["state"].values()} == {3.0}
    assert_same_moments(files["bad_fp16"], files["bad_fp16_ddp"])
    assert files["bad_fp16"]["scaler"] == files["bad_fp16_ddp"]["scaler"]
    assert files["bad_fp16"]["scaler"]["scale"] < 2.0**16  # the scale that it began with


# ── What a rank holds, and what it writes ──


def vit(**options):
    """With 5 rows in the head, 1 in the tokens, and a parameter that never gets a
    gradient.
    """
    model = modeling_finetune.VisionTransformer(
        img_size=32,
        patch_size=16,
        embed_dim=64,
        depth=3,
        num_heads=2,
        num_classes=5,
        init_values=0.1,
        init_scale=1.0,
        **options,
    )
    model.idle = torch.nn.Parameter(torch.ones(2, 2))
    return model


def started(rank, world_size, folder, seed, opt="adamw"):
    settings = {
        "opt": opt,
        "momentum": 0.9,
        "lr": 1e-3,
        "opt_eps": 1e-8,
        "opt_betas": None,
        "weight_decay": 0.05,
    }
    args = Namespace(**settings)
    options = run_state.RunOptions(fsdp=True, output_dir=str(folder))
    run = run_state.Run(
        options,
        Launch(rank, world_size),
        CPU,
        Precision("cpu", None),
        flags={"seed": 0, "allow_changed_run": False},
        data={"images": 0, "digest": ""},
    )
    torch.manual_seed(seed)
    model = vit()
    ema = ModelEmaV3(model, decay=0.5)
    run_state.move_to_device(run, model, ema)
    return run_state.new_state(model, optim_factory.create_optimizer(args, model), run, "vit", ema), run


def trained(rank, world_size, folder):
    """Two steps, saved as a.pth; bytes that this rank holds."""
    state, run = started(rank, world_size, folder, seed=0)
    stage = MeanSquare(run.device, run.precision)
    for step in range(2):
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(10 * step + rank))
        engine.accumulate_gradients(state, stage, [{"image": images}], run, device_transform=dict)
        gradients = sum(held(parameter.grad) for parameter in state.parameters if parameter.grad is not None)
        engine.take_step(state, None)
        state.ema.update(state.model, step)
    with fsdp.gather_model(state.model) as plain:
        assert not isinstance(plain, FSDPModule)
        answers = plain.forward_features(images).detach() if rank == 0 else None  # alone, and not by forward
    assert all(parameter.is_meta for parameter in plain.parameters())  # the copy is gone
    run_checkpoints.save(state, stage, run, 0, ["a.pth"])
    run.saver.wait()
    moments = [
        value
        for moments in state.optimizer.state.values()
        for name, value in moments.items()
        if name != "step"
    ]
    parts = {
        "weights": state.model.parameters(),
        "moments": moments,
        "ema": state.ema.module.parameters(),
    }
    return {name: sum(map(held, tensors)) for name, tensors in parts.items()} | {
        "gradients": gradients,
        "answers": answers,
        "autocast_cache": torch.is_autocast_cache_enabled(),
    }


def reads_of_a_step(rank, world_size, folder, opt):
    """How often the update waits for the device."""
    state, run = started(rank, world_size, folder, seed=0, opt=opt)
    images = torch.randn(2, 3, 32, 32)
    stage = MeanSquare(run.device, run.precision)
    engine.accumulate_gradients(state, stage, [{"image": images}], run, device_transform=dict)
    with Calls("_local_scalar_dense") as reads:
        engine.take_step(state, clip_grad=1.0)
    return len(reads.found)


class Calls(TorchDispatchMode):
    """Bytes of the first argument of each operator with this in its name."""

    def __init__(self, name):
        super().__init__()
        self.name, self.found = name, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.name in str(func):
            self.found.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def gathered_in(dtype, own, rank):
    """Three steps under autocast of `dtype` of a model that was told `own`: losses,
    gathered bytes, weights. The second step's blocks are recomputed.
    """
    torch.manual_seed(0)
    model = vit(use_rel_pos_bias=True)
    fsdp.shard(model, CPU, Block, own)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), []
    with Calls("allgather") as gathers:
        for step in range(3):
            if step == 1:
                recompute_blocks(model)
            images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(10 * step + rank))
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(model(images).float(), torch.arange(4))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    weights = {name: fsdp.gather_full(value) for name, value in model.state_dict().items()}
    return losses, sum(gathers.found), weights


def held(tensor):
    """Bytes of this rank."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def passed_on(rank, world_size, folder, name, other):
    """What one file holds, into a state of other weights and from there into the other
    file.
    """
    state, run = started(rank, world_size, folder, seed=1)
    run_checkpoints.restore(state, MeanSquare(run.device, run.precision), run, folder / name, 1)
    run_checkpoints.save(state, MeanSquare(run.device, run.precision), run, 0, [other])
    run.saver.wait()


@pytest.mark.slow
@on_cpu
def test_each_rank_holds_its_share(both_ranks):
    first, second = both_ranks[1]
    size = sum(parameter.numel() * 4 for parameter in vit().parameters())
    trained_size = size - 16
    for name, expected in {
        "weights": size,
        "gradients": trained_size,
        "moments": 2 * trained_size,
        "ema": size,
    }.items():
        assert first[name] + second[name] == expected, name
        assert max(first[name], second[name]) < 0.52 * expected, name
    assert not first["autocast_cache"]  # else autocast holds all weights in low precision


@pytest.mark.slow
@on_cpu
@pytest.mark.parametrize("dtype", HALVES)
def test_weights_cast_before_they_travel_learn_the_same_bits(both_ranks, dtype):
    """Linear layers are half the bytes; the rest stays in fp32."""
    for rank in both_ranks[1]:
        (losses, bytes_fp32, weights), (same_losses, bytes_cast, same_weights) = rank["gathers"][dtype]
        assert losses == same_losses
        assert all(torch.equal(value, same_weights[name]) for name, value in weights.items())
        assert 0.5 < bytes_cast / bytes_fp32 < 0.6


@pytest.mark.slow
@on_cpu
def test_whether_to_skip_a_step_is_decided_on_the_device(both_ranks):
    """SGD alone asks."""
    assert all(rank["reads"] == {"adamw": 0, "adam": 0, "sgd": 1} for rank in both_ranks[1])


def test_without_torchs_choice_per_weight_nothing_is_cast(monkeypatch):
    block = vit().blocks[0]
    assert fsdp.cast_gathered(block, None) == {}
    assert fsdp.cast_gathered(block, torch.bfloat16)["mp_policy"].param_dtype == torch.bfloat16
    monkeypatch.delattr(MixedPrecisionPolicy, "param_dtype_override_fn")
    assert fsdp.cast_gathered(block, torch.bfloat16) == {}


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
def test_a_share_is_what_torch_cuts(processes):
    for rows in range(1, 12):
        chunks = list(torch.arange(rows).chunk(processes))
        chunks += [torch.arange(0)] * (processes - len(chunks))
        for rank, chunk in enumerate(chunks):
            assert torch.equal(torch.arange(rows)[fsdp.own_rows(rows, processes, rank)], chunk)


@pytest.mark.slow
@on_cpu
def test_one_rank_alone_sees_what_the_checkpoint_holds(both_ranks):
    folder, (first, _) = both_ranks
    model = vit()
    model.load_state_dict(checkpoint(folder / "a.pth")["model"])
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(10))
    assert torch.allclose(model.forward_features(images), first["answers"], atol=1e-6)


@pytest.mark.slow
@on_cpu
def test_checkpoints_go_from_shards_to_one_process_and_back(runs):
    content = checkpoint(runs / "a.pth")
    assert (
        count_bytes(content["optimizer"])
        >= 2 * count_bytes(content["model_ema"])
        > 0.9 * count_bytes(content["model"])
    )
    for other in ("b.pth", "c.pth"):
        assert_same(content, checkpoint(runs / other), ("model", "model_ema", "optimizer"))


def assert_same(one, two, names):
    for name in names:
        assert flat(one[name]).keys() == flat(two[name]).keys()
        for key, value in flat(one[name]).items():
            other = flat(two[name])[key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, (
                name,
                key,
            )


def flat(content, prefix=""):
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else None
    )
    if items is None:
        return {prefix: content}
    return {key: value for name, item in items for key, value in flat(item, f"{prefix}/{name}").items()}


# ── Where the flag does nothing, and where it is refused ──


def test_one_process_says_that_there_is_nothing_to_shard(tmp_path, capsys):
    data = photos(tmp_path / "photos", per_class=4)
    run_class_finetuning.main(finetuning_flags(data, tmp_path / "plain"))
    assert "nothing to shard" not in capsys.readouterr().out
    run_class_finetuning.main(finetuning_flags(data, tmp_path / "out", "--fsdp", "--opt", "adamw"))
    assert capsys.readouterr().out.count("nothing to shard") == 1
    assert_same_weights(tmp_path / "plain/checkpoint.pth", tmp_path / "out/checkpoint.pth")
    assert json.loads((tmp_path / "out/log.txt").read_text().splitlines()[0])["test_images"] == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"compile": True}, "--fsdp and --compile"),
        ({"opt": "lamb"}, "not with lamb"),
        ({"model_ema_force_cpu": True}, "--model_ema_force_cpu has no effect"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, message):
    fine = {"compile": False, "opt": "AdamW", "model_ema_force_cpu": False}
    gpu = torch.device("cuda")
    fsdp.check_options(**fine, device=gpu)
    with user_reads(message):
        fsdp.check_options(**fine | flags, device=gpu)


def test_a_cpu_without_averaging_collectives_is_refused(monkeypatch):
    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms", raising=False)
    with pytest.raises(UserError, match="`fsdp` on CPUs needs a newer torch"):
        fsdp.check_options("adamw", compile=False, model_ema_force_cpu=False, device=CPU)
