"""What outlives a run beside its checkpoints: metrics.jsonl and environment.json."""

import json
import math
import shlex
import subprocess
import sys

import pytest
import torch
from many_processes import one_process, two_processes
from refusals import refused
from tiny_runs import as_flags, checkpoint, finetuning_flags, kill_after, spoil_loss
from tiny_stages import STAGES, all_stages, metrics

import engine_for_finetuning
from monitoring import environment
from monitoring.reporter import Reporter
from monitoring.run_files import JsonLines, finite_only

KEYS = "step images loss lr grad_norm images_per_second data_wait memory skipped".split()
TIMED = {"images_per_second", "data_wait", "memory", "mfu"}  # else a resumed run repeats them


def untimed(lines):
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


@pytest.fixture(scope="module")
def stages(data, tokenizer_weight, tmp_path_factory):
    return all_stages(data, tokenizer_weight, tmp_path_factory.mktemp("stages"))


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_goes_on_with_its_figures(stage, stages, tmp_path, monkeypatch):
    """Killed between two reports, behind one that the resumed run takes again."""
    main, flags = stages[stage]
    often = as_flags(print_freq=2, save_ckpt_steps=3)
    main(flags(tmp_path / "whole", *often))
    with monkeypatch.context() as patched:
        kill_after(5, patched)
        with pytest.raises(KeyboardInterrupt):
            main(flags(tmp_path / "killed", *often))
    assert [line["step"] for line in metrics(tmp_path / "killed")] in ([2, 4], [2, 3, 4])
    main(flags(tmp_path / "killed", *often))
    whole, killed = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert untimed(killed) == untimed(whole)
    steps, images = ([2, 3, 4, 6], 2) if stage == "segmentation" else ([2, 4, 6, 8], 4)
    assert [line["step"] for line in whole] == steps
    assert [line["images"] for line in whole] == [images * step for step in steps]
    assert all(set(KEYS) <= line.keys() for line in whole)
    assert all(0 <= line["data_wait"] <= 1 and line["images_per_second"] > 0 for line in whole)
    if stage == "vqkd":
        assert all(1 <= line["perplexity"] <= line["codes_used"] <= 16 for line in whole)


def test_another_print_freq_on_resume_gives_each_step_once(stages, tmp_path, monkeypatch):
    main, flags = stages["finetuning"]
    main(flags(tmp_path / "whole", *as_flags(print_freq=3)))
    with monkeypatch.context() as patched:
        kill_after(5, patched)
        with pytest.raises(KeyboardInterrupt):
            main(flags(tmp_path / "killed", *as_flags(print_freq=1, save_ckpt_steps=4)))
    main(flags(tmp_path / "killed", *as_flags(print_freq=3)))
    whole, killed = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert [line["step"] for line in killed] == [1, 2, 3, 4, 6, 8]
    assert untimed(killed)[-2:] == untimed(whole)[-2:]  # of the second epoch, steps 5 to 6 and 7 to 8


def test_two_processes_write_one_line_a_report(data, tmp_path):
    flags = [*as_flags(print_freq=2, epochs=1), "--batch_size", "2"]
    two_processes("run_class_finetuning.py", finetuning_flags(data, tmp_path, *flags))
    assert [(line["step"], line["images"]) for line in metrics(tmp_path)] == [(2, 8), (4, 16)]


def test_images_are_those_that_were_seen(stages, tmp_path):
    """Batches that shrink to the images there are, and a batch of another size on
    resume.
    """
    main, flags = stages["finetuning"]
    main(flags(tmp_path / "shrunk", *as_flags(batch_size=100)))
    assert [(line["step"], line["images"]) for line in metrics(tmp_path / "shrunk")] == [(1, 16), (2, 32)]
    main(flags(tmp_path / "other", *as_flags(epochs=1)))
    main(flags(tmp_path / "other", *as_flags(batch_size=8)))
    assert [(line["step"], line["images"]) for line in metrics(tmp_path / "other")] == [(4, 16), (6, 32)]


def test_a_checkpoint_of_earlier_code_counts_its_images(stages, tmp_path):
    main, flags = stages["finetuning"]
    main(flags(tmp_path, *as_flags(epochs=1)))
    content = checkpoint(tmp_path / "checkpoint.pth")
    del content["next"]["images"], content["skipped"]
    torch.save(content, tmp_path / "checkpoint.pth")
    main(flags(tmp_path))
    assert [line["images"] for line in metrics(tmp_path)] == [16, 32]


def test_skipped_steps_are_counted_and_no_figure_is_nan(stages, tmp_path, monkeypatch):
    main, flags = stages["finetuning"]
    once = as_flags(print_freq=1, epochs=1)
    with monkeypatch.context() as patched:
        spoil_loss(patched, engine_for_finetuning.FinetuningStage, steps={1, 3})
        main(flags(tmp_path, *once, *as_flags(save_ckpt_steps=1)))
    lines = metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2]
    assert [line["loss"] is None for line in lines] == [False, True, False, True]
    assert checkpoint(tmp_path / "checkpoint.pth")["skipped"] == 2
    main(flags(tmp_path))
    assert metrics(tmp_path)[-1]["skipped"] == 2


def test_fp16_says_by_what_the_loss_is_scaled(stages, tmp_path):
    main, flags = stages["finetuning"]
    main(flags(tmp_path, *as_flags(amp_dtype="fp16", epochs=1)))
    assert metrics(tmp_path)[-1]["loss_scale"] == 65536


def test_figures_that_are_not_finite_are_null():
    line = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5, "e": 3, "f": None}
    assert finite_only(line) == {"a": None, "b": None, "c": None, "d": 1.5, "e": 3, "f": None}


def test_the_codebook_has_no_figures_before_there_is_one(stages, tmp_path):
    main, flags = stages["vqkd"]
    main(flags(tmp_path, *as_flags(print_freq=1, epochs=30, quantizer_warmup_steps=2, codebook_n_emd=4)))
    used = [line["codes_used"] for line in metrics(tmp_path)]
    assert used[:2] == [None, None]
    assert all(1 <= number <= 4 for number in used[-4:])


def in_the_way(name, folder, monkeypatch):
    """A folder that is called like a file of the run, once it trains."""
    start = Reporter.start_epoch

    def taken(self, *args):
        start(self, *args)
        (folder / name).mkdir(exist_ok=True)

    monkeypatch.setattr(Reporter, "start_epoch", taken)


def test_a_log_that_cannot_be_written_ends_in_a_sentence(stages, tmp_path, capsys, monkeypatch):
    main, flags = stages["finetuning"]
    in_the_way("log.txt", tmp_path, monkeypatch)
    error = refused(main, flags(tmp_path), capsys)
    assert "log.txt" in error
    assert "could not be written" in error


def test_metrics_that_cannot_be_written_cost_no_steps(stages, tmp_path, capsys, monkeypatch):
    main, flags = stages["finetuning"]
    in_the_way("metrics.jsonl", tmp_path, monkeypatch)
    main(flags(tmp_path))
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written") == 1
    assert (tmp_path / "checkpoint.pth").exists()


def test_lines_go_on_behind_one_that_was_cut(tmp_path):
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.path.mkdir()
    file.append_if_possible({"step": 1})
    file.path.rmdir()
    file.path.write_text('{"step": 1')
    for step in (2, 3):
        file.append_if_possible({"step": step})
    assert file.path.read_text() == '{"step": 1\n{"step": 2}\n{"step": 3}\n'
    assert [line["step"] for line in file.read("step")] == [2, 3]


def test_a_line_cut_by_a_kill_is_replaced(stages, tmp_path):
    main, flags = stages["finetuning"]
    main(flags(tmp_path, *as_flags(epochs=1, print_freq=2)))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "im')
    main(flags(tmp_path, *as_flags(print_freq=2)))
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 6, 8]


def test_a_new_run_in_the_same_folder_sets_the_old_figures_aside(stages, tmp_path):
    main, flags = stages["finetuning"]
    for _ in range(2):
        main(flags(tmp_path, *as_flags(epochs=1, no_auto_resume=True)))
    assert [line["step"] for line in metrics(tmp_path)] == [4]
    assert len(list(tmp_path.glob("metrics-until-*.jsonl"))) == 1


# ── environment.json ──


def environment_of(out):
    return json.loads((out / "environment.json").read_text())


def test_the_environment_says_how_to_start_it_again(data, tmp_path):
    """In a process of its own: what is typed is pasted."""
    out = tmp_path / "with a blank"
    flags = finetuning_flags(data, out, *as_flags(epochs=1))
    one_process("run_class_finetuning.py", flags)
    facts = environment_of(out)
    words = shlex.split(facts["command"])
    assert words[:2] == ["python", "run_class_finetuning.py"]
    assert words[2:] == flags
    assert facts["flags_given"]["layer_decay"] == 0.8
    assert facts["flags"]["seed"] == 0
    assert "seed" not in facts["flags_given"]
    assert facts["torch"] == torch.__version__
    assert facts["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["variables"]["OMP_NUM_THREADS"] == "1"
    assert (facts["step"], facts["world_size"], facts["earlier"]) == (0, 1, [])
    assert (facts["gpu"], facts["cuda"]) == ([], torch.version.cuda)
    assert facts["memory"] > 2**28
    assert facts["cores"] >= 1
    assert not list(out.glob(".environment*"))


def test_a_launcher_is_part_of_the_command(data, tmp_path):
    flags = finetuning_flags(data, tmp_path, *as_flags(epochs=1))
    two_processes("run_class_finetuning.py", flags)
    facts = environment_of(tmp_path)
    launch = ["torchrun", "--nnodes=1", "--nproc_per_node=2", "run_class_finetuning.py"]
    assert shlex.split(facts["command"]) == [*launch, *flags]
    assert (facts["world_size"], list(facts["processes"].values())) == (2, [2])


def test_earlier_starts_are_kept_and_other_runs_set_aside(stages, tmp_path, monkeypatch):
    main, flags = stages["finetuning"]
    for epochs, threads in ((1, "1"), (2, "2"), (3, "2")):
        monkeypatch.setenv("OMP_SCHEDULE", threads)
        main(flags(tmp_path, *as_flags(epochs=epochs)))
    facts = environment_of(tmp_path)
    assert (facts["step"], facts["flags"]["epochs"]) == (8, 3)
    first, second = facts["earlier"]
    assert [(each["step"], each["flags"]["epochs"]) for each in (first, second)] == [(0, 1), (4, 2)]
    assert first["variables"]["OMP_SCHEDULE"] == "1"
    assert "variables" not in second  # as those of the start after it
    assert not {"packages", "host", "diff"} & (first.keys() | second.keys())
    main(flags(tmp_path, *as_flags(no_auto_resume=True, epochs=1)))
    assert environment_of(tmp_path)["earlier"] == []
    (aside,) = tmp_path.glob("environment-until-*.json")
    assert json.loads(aside.read_text())["step"] == 8


@pytest.mark.parametrize("content", ["", '{"step": ', "[1]", '{"earlier": 3}'])
def test_a_broken_environment_file_stops_no_run(content, stages, tmp_path):
    main, flags = stages["finetuning"]
    main(flags(tmp_path, *as_flags(epochs=1)))
    (tmp_path / "environment.json").write_text(content)
    main(flags(tmp_path))
    assert environment_of(tmp_path)["step"] == 4


def run_git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """One commit, in which the code is a folder beside another."""
    for name in ("code", "home"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("first = 1\n")
    run_git(tmp_path, "init", "-q")
    run_git(tmp_path, "add", ".")
    run_git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setattr(environment, "ROOT", tmp_path / "code")
    environment.describe_code.cache_clear()
    yield tmp_path
    environment.describe_code.cache_clear()


def test_the_code_is_a_commit_a_diff_and_what_git_does_not_know(repository):
    code = environment.describe_code()
    assert len(code.pop("commit")) == 40
    assert code == {"diff": "", "diff_cut": False, "untracked": []}
    environment.describe_code.cache_clear()
    (repository / "code/a.py").write_text("second = 2\n")
    (repository / "home/a.py").write_text("of somebody else\n")
    (repository / "code/new.py").write_text("third = 3\n")
    code = environment.describe_code()
    assert "-first = 1\n+second = 2\n" in code["diff"]
    assert "somebody" not in code["diff"]
    assert code["untracked"] == ["new.py"]


@pytest.mark.parametrize(("size", "cut"), [(2**19, False), (2**21, True)])
def test_a_long_diff_is_cut_and_says_so(size, cut, repository):
    (repository / "code/a.py").write_text("a line of 20 letters\n" * (size // 21))
    code = environment.describe_code()
    assert code["diff_cut"] is cut
    assert len(code["diff"]) == 2**20 if cut else size / 2 < len(code["diff"]) < 2**20


@pytest.mark.parametrize("missing", ["git", "repository"])
def test_without_git_or_a_repository_the_rest_is_there(missing, stages, tmp_path, monkeypatch):
    environment.describe_code.cache_clear()
    if missing == "git":
        monkeypatch.setenv("PATH", "/nowhere")
    else:
        monkeypatch.setattr(environment, "ROOT", tmp_path)
    main, flags = stages["finetuning"]
    main(flags(tmp_path / "out", *as_flags(epochs=1)))
    environment.describe_code.cache_clear()
    facts = environment_of(tmp_path / "out")
    assert (facts["commit"], facts["diff"], facts["untracked"]) == (None, None, [])
    assert facts["torch"] == torch.__version__


SECRET = "s3cretOfTheUser12345"
SECRETS = {
    "password of a URL": f"https://user:{SECRET}@host/a.pth",
    "user of a URL": f"https://{SECRET}@host/a.pth",
    "signature of a URL": f"https://host/a.pth?X-Amz-Signature={SECRET}&b=1",
    "URL of a database": f"mysql+pymysql://user:{SECRET}@host/runs",
    "header of a pipe": f"pipe:curl -H 'Authorization: Bearer {SECRET}' https://host/a.tar",
    "basic header": f"pipe:curl -H 'Authorization: Basic {SECRET}' https://host/a.tar",
    "token of the hub": f"hf_{SECRET}",
    "token of GitHub": f"prefix ghp_{SECRET} suffix",
    "literal in code": f'+wandb.login(key=1, api_key="{SECRET}")',
}


@pytest.mark.parametrize("kind", SECRETS)
def test_no_value_holds_a_secret(kind):
    assert SECRET not in json.dumps(environment.mask_secrets({"a": [SECRETS[kind]]}))


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "SLURM_JWT", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_KEY", "hub-token"]
)
def test_values_of_secret_names_are_hidden(name):
    assert environment.mask_secrets({name: SECRET}) == {name: "***"}


def test_what_is_no_secret_is_kept():
    facts = {
        "tokenizer_weight": "out/vqkd/checkpoint.pth",
        "model_key": "model|module",
        "checkpoint_key": "model",
        "data_path": "https://host:8080/shards/{000..099}.tar",
        "use_token": True,
        "text": 'tokens = self.encode(x, token=None)\n+password = ""',
        "NCCL_SOCKET_IFNAME": "eth0",
    }
    assert environment.mask_secrets(facts) == facts


def test_a_run_s_file_holds_no_secret(stages, tmp_path, monkeypatch):
    """Of flags, the command line, variables and the changed code."""
    main, flags = stages["finetuning"]
    url = f"tcp://user:{SECRET}@127.0.0.1:1?token={SECRET}"
    words = flags(tmp_path, *as_flags(epochs=1, dist_url=url))
    monkeypatch.setattr(sys, "argv", ["run_class_finetuning.py", *words])
    for name in ("HF_TOKEN", "WANDB_API_KEY", "SLURM_JWT", "SECRET_OF_ANOTHER_PROGRAM"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRETS["URL of a database"])
    code = {"commit": "1", "diff": SECRETS["literal in code"], "diff_cut": False, "untracked": []}
    monkeypatch.setattr(environment, "describe_code", lambda: code)
    main(words)
    text = (tmp_path / "environment.json").read_text()
    assert SECRET not in text
    facts = json.loads(text)
    assert "--dist_url" in facts["command"]
    assert facts["variables"]["MLFLOW_TRACKING_URI"] == "mysql+pymysql://host/runs"
    assert "SECRET_OF_ANOTHER_PROGRAM" not in text


def test_a_secret_flag_is_hidden_in_the_command(monkeypatch):
    words = ["--hub_token", SECRET, "--lr", "1", f"--password={SECRET}"]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    assert environment.quote_command(words) == "python run.py --hub_token '***' --lr 1 '--password=***'"
    assert environment.quote_command(["--lr", "2"]) is None  # a call of `main`
