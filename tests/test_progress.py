"""What a user sees of a run: on real pseudo-terminals of several widths, in files, from
two processes, of runs that were stopped; and the parts that it is made of.
"""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from many_processes import LAUNCHERS, environment, free_port
from source_files import ROOT, load_script
from tiny_runs import as_flags, assert_same_weights, log_lines, pretraining_flags, vqkd_flags

import run_beitv2_pretraining
import run_vqkd_training
from errors import UserError
from monitoring import progress
from monitoring.progress import WIDEST, Remark, RunTime, fit, format_epoch, format_report
from runtime import terminal
from runtime.metrics import RunningMeans
from runtime.terminal import format_duration, format_end, format_figure, say_if_slow, status

pty, termios, fcntl = (pytest.importorskip(name) for name in ("pty", "termios", "fcntl"))
SHORT = ["--epochs", "2", "--print_freq", "1", "--num_workers", "1"]


# ── Pseudo-terminals ──


def lines_on_screen(raw: str, columns: int) -> list[str]:
    """What a terminal of so many columns shows after `raw`; it wraps behind the last."""
    lines, at = [""], 0
    for char in raw:
        if char == "\r":
            at = 0
        elif char == "\n":
            lines.append("")
            at = 0
        else:
            assert char.isprintable(), ascii(char)
            if at == columns:
                lines.append("")
                at = 0
            lines[-1] = lines[-1][:at].ljust(at) + char + lines[-1][at + 1 :]
            at += 1
    return [line.rstrip() for line in lines]


class Terminal:
    """A command whose three streams are a pseudo-terminal, which controls it."""

    def __init__(self, command, columns, **streams):
        self.columns, (self.master, slave) = columns, pty.openpty()
        termios.tcsetwinsize(slave, (40, columns))
        self.modes = termios.tcgetattr(slave)

        def controlled():
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), start_new_session=True, preexec_fn=controlled,
            **{"stdin": slave, "stdout": slave, "stderr": slave, **streams},
        )  # fmt: skip
        self.slave, self.raw = slave, b""
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        with contextlib.suppress(OSError):  # EIO: nobody writes there any more
            while part := os.read(self.master, 65536):
                self.raw += part

    def wait_for(self, pattern, seconds=120):
        end = time.monotonic() + seconds
        while not re.search(pattern, self.raw.decode()):
            assert time.monotonic() < end and self.process.poll() is None, self.raw.decode()
            time.sleep(0.01)

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self, status=0):
        """The lines that it shows at the end."""
        assert self.process.wait(timeout=240) == status, self.raw.decode()
        modes = termios.tcgetattr(self.slave)
        os.close(self.slave)
        self.thread.join(timeout=10)
        os.close(self.master)
        assert modes == self.modes
        return lines_on_screen(self.raw.decode().replace("\r\n", "\n"), self.columns)


def pretrain(flags, launcher=()):
    return [sys.executable, *launcher, "run_beitv2_pretraining.py", *flags]


def check_whole(lines, columns):
    """No line is glued to another, left over, or wrapped but for a long word."""
    assert all(len(line) < columns or len(line.split()[-1]) > columns - 12 for line in lines)
    assert not [line for line in lines if re.search(r"\S.*(epoch \d+/\d+ |finished|training   )", line)]
    assert not [line for line in lines if re.match(r"epoch \d+/\d+ \[", line)]
    assert lines[-1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_a_terminal_of_any_width(columns, data, tokenizer_weight, tmp_path):
    flags = pretraining_flags(data, tmp_path, tokenizer_weight, *SHORT)
    seen = Terminal(pretrain(flags), columns)
    lines = seen.end()
    check_whole(lines, columns)
    text = "\n".join(lines)
    assert "training   2 epochs, 8 steps; an epoch is 4 steps, 16 images" in " ".join(
        text.split("\n           ")
    )
    assert re.search(r"\nepoch 1/2 done in .*\n(( +train)+\n)?  loss +\d", text)
    assert lines[-2].startswith("finished epoch 2 in")
    updates = re.findall(r"\repoch 1/2 \[1/4\]  loss [^\r]*", seen.raw.decode())
    assert updates and all(len(update.strip()) <= min(columns, 120) - 3 for update in updates)


@pytest.mark.slow
def test_a_terminal_does_not_change_the_weights(data, tokenizer_weight, tmp_path):
    seen, piped = (pretraining_flags(data, tmp_path / name, tokenizer_weight, *SHORT) for name in "ab")
    Terminal(pretrain(seen), 80).end()
    run_beitv2_pretraining.main([*piped, "--print_freq", "100"])
    assert_same_weights(tmp_path / "a/checkpoint.pth", tmp_path / "b/checkpoint.pth")


@pytest.mark.slow
def test_ctrl_c_leaves_the_terminal_whole(data, tokenizer_weight, tmp_path):
    flags = pretraining_flags(data, tmp_path, tokenizer_weight, "--epochs", "200", "--num_workers", "1")
    seen = Terminal(pretrain(flags), 80)
    seen.wait_for(r"epoch 2/200 \[1/4\]")
    seen.type("\x03")
    lines = seen.end()
    check_whole(lines, 80)
    assert re.fullmatch(r"stopped by SIGINT after step \d+: rerun the same command to resume", lines[-2])
    again = Terminal(pretrain(flags), 80)
    again.wait_for(r"training   goes on after \d steps? of epoch \d+ of 200, [\d,]+ of 800 steps\s+left")
    again.wait_for(r"time       about .* for the \d+ epochs left")
    again.process.send_signal(signal.SIGTERM)
    check_whole(again.end(), 80)


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_a_line_behind(data, tokenizer_weight, tmp_path, monkeypatch):
    """Within a step that takes long."""
    code = (
        "import sys, time, engine, run_beitv2_pretraining as run\n"
        "step = engine.Trainer.train_one_step\n"
        "slow = lambda self, batches: step(self, batches) or (self.state.step > 1 and time.sleep(300))\n"
        "engine.Trainer.train_one_step = slow\n"
        "run.main(sys.argv[1:])"
    )
    flags = pretraining_flags(data, tmp_path, tokenizer_weight, *SHORT)
    seen = Terminal([sys.executable, "-c", code, *flags], 80)
    seen.wait_for(r"epoch 1/2 \[1/4\]")
    time.sleep(1)
    seen.type("\x03")
    time.sleep(0.5)
    seen.type("\x03")
    lines = seen.end(-signal.SIGINT)
    assert lines[-1] == "" and lines[-2].startswith("epoch 1/2 [1/4]")


@pytest.mark.slow
def test_two_processes_share_a_terminal(data, tokenizer_weight, tmp_path):
    flags = pretraining_flags(data, tmp_path, tokenizer_weight, "--epochs", "3")
    launcher = [*LAUNCHERS["torchrun"][1:], "--nproc_per_node=2", f"--master_port={free_port()}"]
    lines = Terminal(pretrain(flags, launcher), 120).end()
    check_whole(lines, 120)
    assert sum(line.startswith("epoch 1/3 done in") for line in lines) == 1


@pytest.mark.slow
def test_files_have_short_plain_lines(data, tokenizer_weight, tmp_path):
    """Of stdout, while stderr is a terminal, which then shows progress."""
    flags = pretraining_flags(data, tmp_path / "out", tokenizer_weight, *SHORT)
    with open(tmp_path / "said", "wb") as file:
        screen = Terminal(pretrain(flags), 100, stdout=file)
        lines = screen.end()
    said = (tmp_path / "said").read_bytes().decode()
    assert not re.search(r"[\r\x1b]", said)
    shown = [line for line in said.splitlines() if line.startswith("epoch")]
    assert len(shown) == 2 * (4 + 1)
    assert all(len(line) <= WIDEST for line in shown)
    assert re.search(r"\repoch 1/2 \[1/4\]  loss ", screen.raw.decode())
    assert "".join(lines) == ""


# ── The line that rewrites itself ──


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    """stdout as a terminal of 80 columns, and the project's log on it."""
    shown = Screen()
    streams = SimpleNamespace(stdout=shown, stderr=io.StringIO())  # pytest has its own sys.stdout
    monkeypatch.setattr(terminal, "sys", streams)
    monkeypatch.setattr(progress, "sys", streams)
    monkeypatch.setattr(terminal.StatusLine, "width", 79)
    terminal.set_up_logging(0)
    yield shown
    status.clear()


def test_the_log_appears_above_the_status_line(screen):
    status.show("epoch 1/2 [1/9]  loss 1.000")
    terminal.log.info("a warning")
    status.show("epoch 1/2 [2/9]")
    assert lines_on_screen(screen.getvalue(), 80) == ["a warning", "epoch 1/2 [2/9]"]
    assert status.clear() == "epoch 1/2 [2/9]"
    assert lines_on_screen(screen.getvalue(), 80) == ["a warning", ""]


def test_long_lines_are_wrapped_under_their_label(screen):
    terminal.log.info("flags      " + "batch_size=16, " * 12)
    lines = lines_on_screen(screen.getvalue(), 80)
    assert len(lines) > 2 and max(map(len, lines)) < 80
    assert all(line.startswith(" " * 11 + "batch") for line in lines[1:-1])


def test_a_data_process_leaves_the_status_line_alone(screen, monkeypatch):
    status.show("epoch 1/2")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    terminal.log.info("from a data process")
    assert screen.getvalue().endswith("from a data process\n")


def test_another_rank_clears_the_line_before_it_speaks(screen):
    terminal.set_up_logging(1)
    try:
        terminal.log.error("lost")
    finally:
        terminal.set_up_logging(0)
    assert lines_on_screen("epoch 1/2 [1/9]  loss 1" + screen.getvalue(), 80) == ["[rank 1] lost", ""]


def test_updates_come_by_time_and_reports_only_to_files(screen, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = progress.Progress()
    shown.start_epoch("epoch 1/2 [0/9]")
    assert shown.is_due()  # at the first step
    shown.update("epoch 1/2 [1/9]", ["loss 1.000", "lr 1"], 90.0, report=False)
    assert status.text == "epoch 1/2 [1/9]  loss 1.000  eta 0:01:30  lr 1"
    assert not shown.is_due()
    clock[0] += 10
    assert shown.is_due()
    shown.update("epoch 1/2 [5/9]", ["loss 0.500"], None, report=True)
    assert not shown.is_due()
    shown.start_epoch("epoch 2/2 [0/9]")
    assert shown.is_due()
    shown.close()
    assert lines_on_screen(screen.getvalue(), 80) == [""]


def test_what_takes_long_is_said(screen, monkeypatch):
    monkeypatch.setattr(terminal, "SLOW", 0.05)
    before = threading.active_count()
    with say_if_slow("reading    a file"):
        pass
    assert "reading" not in screen.getvalue()
    with say_if_slow("reading    a file"):
        time.sleep(0.2)
    assert screen.getvalue() == "reading    a file\n"
    with pytest.raises(UserError), say_if_slow("x"):
        raise UserError("no")
    assert threading.active_count() == before  # data processes may be forked


def test_a_slow_search_says_where(data, tmp_path, monkeypatch):
    """Folders, folders of classes and a file of weights."""
    from checkpoint_io import weight_files
    from data_pipeline import image_lists

    monkeypatch.setattr(terminal, "SLOW", 0.0)
    monkeypatch.setattr(terminal.threading.Timer, "cancel", lambda timer: time.sleep(0.05))
    said: list[str] = []
    monkeypatch.setattr(terminal.log, "info", said.append)
    image_lists.find_images(str(data))
    image_lists.find_classes_folder(str(data))
    (tmp_path / "w.pth").write_bytes(b"no")
    with pytest.raises(UserError):
        weight_files.load_file(tmp_path / "w.pth")
    searching = f"searching  {data} for images"
    assert said == [searching, searching, f"reading    {tmp_path / 'w.pth'}"]


# ── Figures, times and tables ──


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "1.000e-05"), (0.00123456, "0.001235"), (0.5, "0.5000"), (81.25, "81.25"), (100.0, "100.0"),
        (999.96, "1,000"), (12345.6, "12,346"), (3e8, "3.000e+08"), (256, "256"), (0, "0"), (0.0, "0"),
        (-0.25, "-0.2500"), (float("nan"), "nan"), (float("inf"), "inf"), (2_000_000_000, "2,000,000,000"),
    ],
)  # fmt: skip
def test_figures_have_four_digits(value, text):
    assert format_figure(value) == text


def test_durations_are_plain():
    seconds = (0.041, 3.14, 9.96, 41, 60, 130, 3600, 12000, 86400 * 2 + 3600 * 4, 86399.8)
    assert [format_duration(value) for value in seconds] == [
        "0.041 s", "3.1 s", "10 s", "41 s", "1 min", "2 min 10 s", "1 h", "3 h 20 min", "2 d 4 h", "1 d",
    ]  # fmt: skip


def test_the_day_of_the_end_is_named(monkeypatch):
    noon = time.mktime((2026, 6, 3, 12, 0, 0, 0, 0, -1))
    now = time.localtime(noon)
    monkeypatch.setattr(terminal.time, "time", lambda: noon)
    real = time.localtime
    monkeypatch.setattr(terminal.time, "localtime", lambda *at: real(*at) if at else now)
    assert format_end(7500) == "14:05"
    assert format_end(86400) == "Thu 12:00"
    assert format_end(20 * 86400) == "23 Jun 12:00"


def test_what_matters_least_is_cut_from_the_end():
    means = {"loss": 1.5, "grad_norm": 0.25, "mlm_acc_1": 1e-5}
    parts = format_report(means, 1.5e-3, 44.4, 0.031, 2**30)
    assert parts == [
        "loss 1.500", "mlm_acc_1 1.000e-05", "44 images/s", "data wait 3%", "lr 1.50e-03", "1.0 GiB",
        "grad_norm 0.2500",
    ]  # fmt: skip
    for width in range(20, 130):
        line = fit(["epoch 1/2 [1/9]", *parts], width)
        assert len(line) <= width
        assert "epoch 1/2 [1/9]  " + "  ".join(parts) == line + "  ".join(["", *parts[line.count("  ") :]])
    remark = Remark("warm-up step 4 of 9", "", ["mlm_acc_1"])
    assert format_report(means, 1.5e-3, 44.4, 0.031, None, remark)[:3] == [
        "loss 1.500", "warm-up step 4 of 9", "44 images/s",
    ]  # fmt: skip


def test_the_table_of_an_epoch():
    train = {"loss": 1.5, "class_acc": 0.25, "lr": 1e-5}
    assert format_epoch(train, {"test_loss": 1.25, "test_acc1": 81.25}) == [
        "                 train   test",
        "  loss           1.500  1.250",
        "  class_acc     0.2500",
        "  lr         1.000e-05",
        "  acc1                  81.25",
    ]
    assert format_epoch(train, {}) == ["  loss 1.500  class_acc 0.2500  lr 1.000e-05"]
    assert format_epoch(train, {}, 40) == [
        "                 train",
        "  loss           1.500",
        "  class_acc     0.2500",
        "  lr         1.000e-05",
    ]
    assert format_epoch(train, {}, remark=Remark("", "", train)) == []


@pytest.mark.parametrize("width", [59, 79, 119])
def test_long_tables_are_cut_into_blocks(width):
    layers = {f"test_acc1_layer{number}": 10.0 * number for number in range(1, 13)}
    lines = format_epoch({"loss": 1.5, "grad_norm": 0.1}, layers, width)
    assert max(map(len, lines)) <= width
    assert len(lines) == {59: 15, 79: 8, 119: 8}[width]
    assert all(f"acc1_layer{number} " in "\n".join(lines) for number in range(1, 13))
    assert len(format_epoch({f"{'x' * 60}{n}": 1.0 for n in range(30)}, {}, 59)) == 31  # nothing fits beside


def test_the_time_leaves_out_the_first_step_and_adds_pauses(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    run = RunTime()
    run.start_epoch(0)
    assert run.is_due(1)  # a time is taken when the first step is done
    clock[0] = 60.0
    run.take(1, report=False)
    assert run.left(9, 2) is None
    clock[0] = 61.0
    assert not run.is_due(2)
    clock[0] = 62.0
    assert run.is_due(3)
    run.take(3, report=False)
    assert run.left(7, 2) == 7.0
    run.end_epoch()
    clock[0] = 70.0
    run.count_pause()
    assert run.left(7, 1) == 7.0 + 8.0
    clock[0] = 72.0
    run.start_epoch(3)
    clock[0] = 74.0
    run.take(5, report=False)
    assert run.left(5, 1) == 5.0 + 10.0


def test_epochs_of_one_step_are_timed_too(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    run = RunTime()
    for step in range(1, 5):
        run.start_epoch(step - 1)
        clock[0] += 1.0
        run.take(step, report=True)
        run.end_epoch()
        clock[0] += 5.0
    assert run.left(1, 0) == 1.0


def test_the_device_is_read_only_to_tell(data, tokenizer_weight, tmp_path, monkeypatch, capsys):
    """With neither a terminal nor reports: once at the first step, and for the time."""
    monkeypatch.setattr(progress, "TIMED_SECONDS", 0.0)
    read, compute = [], RunningMeans.compute_new
    monkeypatch.setattr(RunningMeans, "compute_new", lambda means: read.append(1) or compute(means))
    flags = pretraining_flags(data, tmp_path, tokenizer_weight, "--epochs", "3", "--print_freq", "1000")
    run_beitv2_pretraining.main(flags)
    said = capsys.readouterr().out
    assert re.search(
        r"\ntime       about \S+ s for the 3 epochs left \(.* s a step, evaluation not counted\)", said
    )
    assert len(read) == 2 + 3  # and at the end of each epoch


def test_classes_and_what_is_ahead_are_told(data, tmp_path, capsys):
    from tiny_runs import finetuning_flags

    import run_class_finetuning

    run_class_finetuning.main(finetuning_flags(data, tmp_path, "--epochs", "1"))
    assert (
        "training   1 epoch, 4 steps; an epoch is 4 steps, 16 images of 2 classes\n"
        in capsys.readouterr().out
    )


def test_the_warm_up_of_the_quantizer_is_called_so(data, tmp_path, capsys):
    more = as_flags(quantizer_warmup_steps=4, epochs=3, print_freq=1, image_freq=1, codebook_n_emd=2)
    run_vqkd_training.main(vqkd_flags(data, tmp_path, *more))
    said = capsys.readouterr().out
    first, _, rest = said.partition("epoch 2/3 [1/")
    assert "warm-up step 3 of 4" in first
    assert "  warm-up of the quantizer: step 4 of 4; it is bypassed, so there are no codes yet\n" in first
    assert not re.search(r"codes_used|perplexity|quant_loss", first)
    assert "k-means    of " in rest and "codes_used" in rest and "warm-up" not in rest
    assert log_lines(tmp_path)[0]["train_codes_used"] == 0
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert "tokens-0000.png" in names and "codebook_usage-0000.png" not in names
    assert "codebook_usage-0002.png" in names


# ── The demos ──


@pytest.fixture
def stages():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield load_script("stages")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_stages_say_which_and_how_long(stages, capsys):
    demo = stages.Stages({"vqkd": ("a tokenizer learns", 100.0), "pretrain": ("pretraining", 200.0)})
    demo.run("vqkd", lambda: 200.0)
    demo.run("pretrain", lambda: 1.0)
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert said[0] == "── stage 1 of 2: a tokenizer learns ──"
    assert said[1].startswith("time       about 5 min in all on two idle cores")
    assert said[2:] == [
        "── stage 2 of 2: pretraining ──", "time       about 7 min left",  # it is half as fast
    ]  # fmt: skip
    assert demo.seconds == {"vqkd": 200.0, "pretrain": 1.0}


def test_commands_are_shown_as_typed(stages):
    words = [
        "run.py",
        "--data_path",
        f"{ROOT}/my images",
        *as_flags(**dict.fromkeys("abcdefghijklmn", 0.125)),
    ]
    lines = stages.format_command(words)
    assert lines[0].startswith("$ python run.py --data_path 'my images' --a 0.125")
    assert len(lines) > 1 and all(line.endswith(" \\") for line in lines[:-1]) and max(map(len, lines)) <= 88
    assert " ".join(line.removesuffix("\\").strip() for line in lines).endswith("--n 0.125")


@pytest.mark.slow
def test_ctrl_c_lets_the_stage_end_and_is_no_traceback(tmp_path):
    stage = tmp_path / "stage.py"
    stage.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), print('saved'), sys.exit()))\n"
        "print('begun', flush=True)\n"
        "time.sleep(100)\n"
    )
    code = (
        "import sys; sys.path.insert(0, 'scripts')\n"
        "import errors, stages\n"
        f"errors.report_user_errors(stages.run_entry)('tokenizer', {str(stage)!r}, '')"
    )
    demo = Terminal([sys.executable, "-c", code], 120)
    demo.wait_for("begun")
    demo.type("\x03")
    text = "\n".join(demo.end(2))
    assert "saved" in text and "error: stopped in stage tokenizer by Ctrl-C" in text
    assert "Traceback" not in text


def test_judgments_of_stages(stages):
    good = [{"train_loss": 1.0}, {"train_loss": 0.5, "train_codes_used": 250, "train_perplexity": 200.0}]
    assert stages.judge_tokenizer(good, 256).startswith("went well")
    collapsed = [good[0], good[1] | {"train_perplexity": 17.0}]
    assert "most patches by about 17 of them" in stages.judge_tokenizer(collapsed, 256)
    assert stages.judge_tokenizer([good[1], good[1] | {"train_loss": 0.6}], 256).startswith("went badly")
    student = {"train_mlm_acc_1": 0.01, "train_majority_code_share": 0.02}
    assert stages.judge_pretraining([student, student | {"train_mlm_acc_1": 0.2}]).startswith("went well")
    assert stages.judge_pretraining([student, student]).startswith("learned little")
    assert stages.judge_accuracy(80.0, 55.0, 500).startswith("went well")
    assert stages.judge_accuracy(58.0, 55.0, 500).startswith("learned little")
    masks = [{"test_miou": 60.0, "test_aacc": 76.0}]
    assert stages.judge_segmentation(masks, 65.8, 3).startswith("went well")
    assert stages.judge_segmentation(masks, 80.0, 3).startswith("learned little")
