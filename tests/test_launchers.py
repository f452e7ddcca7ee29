"""The same scripts under a launcher: two gloo processes end where one ends, the guide's
command runs, evaluation is exact.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import golden_values
import pytest
import torch
from many_processes import LAUNCHERS, end, free_port, one_process, run, start, two_processes
from tiny_runs import (
    assert_same_weights,
    checkpoint,
    finetuning_flags,
    log_lines,
    photos,
    pretraining_flags,
    tokenizer,
    vqkd_flags,
)

import modeling_vqkd
from errors import UserError
from runtime.distributed import read_launch


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_pretraining_follows_one_curve_on_one_or_two_processes(launcher, data, tmp_path):
    codes = tokenizer(tmp_path / "tokenizer.pth")
    more = ["--drop_path", "0"]  # what drop path draws depends on the rank
    two_processes(
        "run_beitv2_pretraining.py", pretraining_flags(data, tmp_path / "two", codes, *more), launcher
    )
    one_process(
        "run_beitv2_pretraining.py",
        pretraining_flags(data, tmp_path / "one", codes, *more, "--batch_size", "8"),
    )
    two, one = log_lines(tmp_path / "two"), log_lines(tmp_path / "one")
    for mine, other in zip(two, one, strict=True):
        for key in ("train_loss", "train_grad_norm", "train_mlm_acc_1", "train_majority_code_share"):
            assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-3), key


@pytest.mark.slow
def test_the_codebook_of_two_processes_is_that_of_one(data, tmp_path):
    more = ["--quantize_kmeans_init", "--revive_dead_codes", "--eval_data_path", str(data)]
    two_processes("run_vqkd_training.py", vqkd_flags(data, tmp_path / "two", *more))
    one_process("run_vqkd_training.py", vqkd_flags(data, tmp_path / "one", *more, "--batch_size", "8"))
    two, one = log_lines(tmp_path / "two"), log_lines(tmp_path / "one")
    assert two[0]["train_rec_loss"] == pytest.approx(one[0]["train_rec_loss"], rel=1e-3)
    assert two[0]["test_codes_used"] == one[0]["test_codes_used"]
    codebooks = [
        checkpoint(tmp_path / out / "checkpoint.pth")["model"]["quantize.embedding.weight"]
        for out in ("two", "one")
    ]
    assert (codebooks[0] * codebooks[1]).sum(-1).min() > 0.99


@pytest.mark.slow
def test_evaluation_on_two_processes_counts_every_image_once(tmp_path):
    odd = photos(tmp_path / "odd", per_class=5)  # 10 images; batches of 4 leave a remainder on both ranks
    (odd / "b" / "0.jpg").unlink()  # 9: the ranks hold 5 and 4
    flags = finetuning_flags(odd, tmp_path / "out", "--epochs", "1")
    two_processes("run_class_finetuning.py", flags)
    first = log_lines(tmp_path / "out")[0]
    assert first["test_images"] == 9
    resume = ["--eval", "--resume", str(tmp_path / "out/checkpoint.pth")]
    out = one_process("run_class_finetuning.py", [*finetuning_flags(odd, tmp_path / "eval"), *resume])
    assert f"test_acc1 {first['test_acc1']:.4g}" in out


@pytest.mark.slow
def test_two_processes_resume_exactly_and_one_can_take_over(data, tmp_path):
    codes = tokenizer(tmp_path / "tokenizer.pth")
    whole = pretraining_flags(data, tmp_path / "whole", codes, "--drop_path", "0.1")
    two_processes("run_beitv2_pretraining.py", whole)
    broken = pretraining_flags(
        data, tmp_path / "broken", codes, "--drop_path", "0.1", "--save_ckpt_freq", "1"
    )
    two_processes("run_beitv2_pretraining.py", broken)
    first_epoch = tmp_path / "broken/checkpoint-0.pth"
    two_processes("run_beitv2_pretraining.py", [*broken, "--resume", str(first_epoch)])
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "broken/checkpoint.pth")
    alone = pretraining_flags(data, tmp_path / "alone", codes, "--resume", str(first_epoch))
    assert "no longer bit for bit" in one_process("run_beitv2_pretraining.py", alone)
    assert [line["epoch"] for line in log_lines(tmp_path / "alone")] == [1]


@pytest.mark.slow
def test_the_guides_base_command_runs_on_two_processes(tmp_path):
    """Only paths, process count and epochs are changed, and `--device cpu` added (a few
    images: 92 M parameters on a CPU).
    """
    images = photos(tmp_path / "imagenet/train", per_class=2)
    torch.manual_seed(0)
    weights = modeling_vqkd.vqkd_encoder_base_decoder_3x768x12_clip(as_tokenizer=True).state_dict()
    torch.save({"model": weights}, tmp_path / "vqkd.pth")
    del weights
    text = (golden_values.GOLDEN / "beitv2_pretraining_guide.txt").read_text()
    command = shlex.split(re.findall(r"```bash\n(python .*?)```", text, flags=re.DOTALL)[0])
    changed = {
        "/path/to/imagenet-1k/train": str(images),
        "/path/to/save/your_model": str(tmp_path / "out"),
        "--nproc_per_node=16": "--nproc_per_node=2",
        "1600": "1",
        "python": sys.executable,
    }
    command = [str(tmp_path / "vqkd.pth") if "://" in word else changed.get(word, word) for word in command]
    command.insert(command.index("run_beitv2_pretraining.py"), f"--master_port={free_port()}")
    run([*command, "--device", "cpu"])
    model = checkpoint(tmp_path / "out/checkpoint.pth")["model"]
    assert {key: list(value.shape) for key, value in model.items()} == golden_values.data("state_dict_keys")[
        "pretrain_base_cls_pt"
    ]
    assert "train_mlm_acc_2" in log_lines(tmp_path / "out")[0]


def test_ranks_are_read_from_every_launcher():
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert (read_launch(torchrun).rank, read_launch(torchrun).local_rank) == (3, 1)
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"}
    assert (read_launch(slurm).rank, read_launch(slurm).world_size) == (5, 8)
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).world_size == 1  # a shell in an allocation
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert read_launch(mpi, dist_on_itp=True).rank == 1
    assert read_launch(mpi).world_size == 1
    assert read_launch({}).launcher is None


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "abc", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"},
     {"RANK": "0", "WORLD_SIZE": "9" * 30}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"SLURM_STEP_NUM_TASKS": "x"}],
)  # fmt: skip
def test_an_environment_of_nonsense_is_told(environment):
    with pytest.raises(UserError, match="the environment"):
        read_launch(environment, dist_on_itp=True)


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable: hosts of their own as far as sockets
    can tell.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"beit{os.getpid()}a", f"beit{os.getpid()}b"]
    setup = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}",
        *(f"ip -n {name} addr add 10.77.0.{host}/24 dev veth0" for host, name in enumerate(names, start=1)),
        *(f"ip -n {name} link set {device} up" for name in names for device in ("veth0", "lo")),
    ]
    try:
        for command in setup:
            if subprocess.run(command.split(), capture_output=True).returncode:
                pytest.skip(f"network namespaces are not allowed here ({command})")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts_follow_the_curve_of_one_with_two_processes(two_hosts, data, tokenizer_weight, tmp_path):
    flags = pretraining_flags(data, tmp_path / "hosts", tokenizer_weight)
    processes = []
    for node, host in enumerate(two_hosts):
        where = ["--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1"]
        where += ["--master_addr=10.77.0.1", "--master_port=29511"]
        command = [*LAUNCHERS["torch.distributed.launch"], *where, "run_beitv2_pretraining.py", *flags]
        processes.append(start(["ip", "netns", "exec", host, *command], GLOO_SOCKET_IFNAME="veth0"))
    for process in processes:
        status, out = end(process)
        assert status == 0, out
    alone = pretraining_flags(data, tmp_path / "one", tokenizer_weight)
    two_processes("run_beitv2_pretraining.py", alone)
    for mine, other in zip(log_lines(tmp_path / "hosts"), log_lines(tmp_path / "one"), strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    assert_same_weights(tmp_path / "hosts/checkpoint.pth", tmp_path / "one/checkpoint.pth")


def ranks_with(flags, *more):
    """Two processes of pretraining, started by hand, each with its own further
    flags.
    """
    port, processes = str(free_port()), []
    for rank, own in enumerate(more):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, "run_beitv2_pretraining.py", *flags, *own]
        processes.append(start(command, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **place))
    return [end(process) for process in processes]  # in 4 minutes: --dist_timeout is 30


@pytest.mark.slow
@pytest.mark.parametrize("difference", ["flags", "images", "a failure on rank 1", "a failure on rank 0"])
def test_processes_that_differ_end_at_once_and_say_why(difference, data, tokenizer_weight, tmp_path):
    flags = pretraining_flags(data, tmp_path / "out", tokenizer_weight)
    fewer = photos(tmp_path / "fewer", per_class=5)
    nowhere = ["--data_path", str(tmp_path / "nowhere")]
    more, says = {
        "flags": ([[], ["--lr", "7e-4"]], "different flags: --lr 0.001 on rank 0, 0.0007 on rank 1"),
        "images": ([[], ["--data_path", str(fewer)]], "different images: 16 on rank 0, 10 on rank 1"),
        "a failure on rank 1": ([[], nowhere], "nowhere: no such folder"),
        "a failure on rank 0": ([nowhere, []], "nowhere: no such folder"),
    }[difference]
    for status, out in ranks_with(flags, *more):
        assert status == 2, out
        assert says in out
        assert "Traceback" not in out
