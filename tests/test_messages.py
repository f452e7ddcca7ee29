"""What others wrote (names of files and classes, URLs, servers' answers) in what is
printed, logged and kept.
"""

import base64
import http.server
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_runs
import torch
from source_files import ROOT

import arguments
import export_checkpoint
import run_class_finetuning
from checkpoint_io import weight_source
from errors import UserError, count, hide_secrets, printable
from visualization import html

# all but line feeds
RAW = [*range(10), *range(11, 32), *range(127, 160), 0x200B, 0x202E, 0x2066, 0xFEFF, 0xDCFF]
HOSTILE = "\x1b]0;PWN\x07\x9b2J\u202egpj\u200b"


def no_control_character(text: str) -> bool:
    return not any(ord(c) in RAW for c in text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--finetune https://u:pw@h:81/a.pth?sig=X: no file", "--finetune https://h:81/a.pth: no file"),
        ("('http://h/a?b=1', 'http://h/c#d')", "('http://h/a', 'http://h/c')"),
        ("https://u:p/w@h/a.pth", "https://h/a.pth"),
        ("x=http://h/p,y=http://u:pw@g/q?s=1", "x=http://h/p,y=http://g/q"),
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("http://h:80/pkg@1.0/a.pth", "http://h:80/pkg@1.0/a.pth"),
    ],
)
def test_of_urls_scheme_host_and_path_are_shown(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown
    assert str(UserError(text)) == shown


def test_control_characters_are_escaped_and_long_texts_shortened() -> None:
    assert printable(f"a{HOSTILE}\n\udcff é") == r"a\x1b]0;PWN\x07\x9b2J\u202egpj\u200b\n\udcff é"
    key = printable(f"the key {'k' * 10**6} is not known")
    assert key.startswith("the key kkk") and key.endswith("kkk is not known") and len(key) < 500
    assert len(printable("a key " * 10**5)) < 4100


def test_errors_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments.parse(run_class_finetuning.get_parser(), [f"--wrong{HOSTILE}", "http://u:pw@h/?sig=SECRET"])
    said = capsys.readouterr().err
    assert "\\x1b]0;PWN" in said and no_control_character(said) and "SECRET" not in said and "pw@" not in said


def test_tracebacks_of_our_own_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import errors\n@errors.report_user_errors\ndef main():\n"
        f"    raise KeyError('http://u:pw@h/?sig=SECRET') from ValueError({HOSTILE!r})\nmain()"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stderr
    assert (
        "KeyError: 'http://h/'" in said and r"ValueError: \x1b]0;PWN" in said and no_control_character(said)
    )
    assert "SECRET" not in said and "pw@" not in said


def test_pages_are_escaped() -> None:
    page = html.document(f"<b>{HOSTILE}", html.table([("tokenizer", "https://u:pw@h/w.pth?sig=SECRET")]))
    assert (
        "&lt;b&gt;\\x1b]0;PWN" in page and no_control_character(page) and "<td>https://h/w.pth</td>" in page
    )


ASKED: list[str] = []


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        ASKED.append(f"{self.path} {self.headers.get('Authorization')}")
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


def test_secrets_of_urls_stay_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    tiny_runs.photos(tmp_path / "photos", per_class=2)
    tiny_runs.student(tmp_path / "w.pth")
    handler = lambda *args: Handler(*args, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        url = f"http://user:passphrase%40%2F1@{host}/w.pth?X-Amz-Signature=SECRET"
        out = tmp_path / "out"
        flags = tiny_runs.finetuning_flags(tmp_path / "photos", out, "--epochs", "1", "--finetune", url)
        run_class_finetuning.main(flags)
        for wrong in ("none.pth", "photos"):
            with pytest.raises(SystemExit):
                run_class_finetuning.main([*flags[:-1], url.replace("w.pth", wrong), "--no_auto_resume"])
        server.shutdown()
    exported = ["--checkpoint", str(out / "checkpoint.pth"), "--to", "safetensors", "--output"]
    export_checkpoint.main([*exported, str(tmp_path / "e.safetensors")])
    export_checkpoint.main([*exported, str(tmp_path / "e.pth")])
    secret = base64.b64encode(b"user:passphrase@/1").decode()
    assert ASKED[0] == f"/w.pth?X-Amz-Signature=SECRET Basic {secret}"
    kept = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    said = capfd.readouterr()
    for where, text in {**kept, "stdout": said.out.encode(), "stderr": said.err.encode()}.items():
        for word in (b"SECRET", b"passphrase", b"user:", secret.encode()):
            assert word not in text, (where, word)
    shown = f"http://{host}/w.pth"
    assert f"finetune={shown}" in said.out and f"http://{host}/none.pth (HTTP Error 404" in said.err
    assert (
        shown.encode() in kept[str(out / "checkpoint.pth")]
        and shown.encode() in kept[str(tmp_path / "e.safetensors")]
    )


def test_hostile_names_work_and_are_shown_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    photos = tiny_runs.photos(tmp_path / f"photos{HOSTILE}", per_class=4)
    (photos / "a").rename(photos / f"a{HOSTILE}\n\udcff")
    for name in (f"0{HOSTILE}.jpg", "1\nerror: no.jpg", "2\udcff.jpg"):
        (photos / "b" / name).write_bytes(b"broken")
    out = tmp_path / f"out{HOSTILE}"
    flags = tiny_runs.finetuning_flags(photos, out, "--epochs", "1", "--print_freq", "1")
    run_class_finetuning.main(flags)
    run_class_finetuning.main([*flags, "--eval", "--resume", str(out / "checkpoint.pth")])
    with pytest.raises(SystemExit):
        run_class_finetuning.main([*flags, "--finetune", f"{photos}/none.pth"])
    said = capfd.readouterr()
    log = (out / "log.txt").read_bytes().decode("utf-8", "surrogateescape")
    for text in (said.out, said.err, log):
        assert no_control_character(text)
    for name in (r"0\x1b]0;PWN\x07\x9b2J\u202egpj\u200b.jpg", r"1\nerror: no.jpg", r"2\udcff.jpg"):
        assert name in said.out
    assert "\nerror: no.jpg" not in said.out


def test_the_logger_of_a_data_process_escapes(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("beit")
    log.handlers, log.propagate = [caplog.handler], False
    with caplog.at_level(logging.INFO, "beit"):
        log.info("%s of %d", HOSTILE, 2)
    assert caplog.messages == [printable(HOSTILE) + " of 2"]


def test_any_terminal_and_any_length_of_a_name_will_do(tmp_path: Path) -> None:
    code = (
        "import errors\n@errors.report_user_errors\n"
        "def main():\n    print('é')\n    open('k' * 10**6)\nmain()"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "\\xe9\n")
    assert run.stderr.startswith("error: kkk") and run.stderr.endswith("is too long for this file system\n")
    assert len(run.stderr) < 500
    for source in (f"ftp://h/{'k' * 300}", "~nobody-here/w.pth", "k" * 10**6):
        with pytest.raises(UserError, match=r"nobody|kkk"):
            weight_source.locate(source, "--checkpoint")


def test_one_thing_is_not_plural():
    assert [count(number, "step") for number in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]
