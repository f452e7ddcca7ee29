"""scripts/plant_faults.py: its faults fit the code, and it counts those that are found."""

import ast

import pytest
from source_files import ROOT, load_script


@pytest.fixture
def script():
    return load_script("plant_faults")


def test_each_fault_replaces_code_that_is_there_once(script):
    assert len({fault.what for fault in script.FAULTS}) == len(script.FAULTS) >= 20
    for fault in script.FAULTS:
        text = (ROOT / fault.file).read_text()
        assert text.count(fault.right) == 1, fault.what
        ast.parse(text.replace(fault.right, fault.wrong))


def test_it_counts_found_faults_and_leaves_no_trace(script, monkeypatch, tmp_path, capsys):
    states = []

    def run_tests(folder, tests):
        """Finds the first fault alone."""
        planted = [fault for fault in script.FAULTS if fault.wrong and not intact(folder, fault)]
        states.append([fault.what for fault in planted])
        return script.FAULTS[0] not in planted, "test_a - why"

    def intact(folder, fault):
        return (folder / fault.file).read_bytes() == (ROOT / fault.file).read_bytes()

    monkeypatch.setattr(script, "run_tests", run_tests)
    assert script.main(["--only", "1", "2", "8", "--markdown", str(tmp_path / "table.md")]) == 1
    assert capsys.readouterr().out.endswith("found 1 of 3\n")
    first, *_ = (script.FAULTS[number - 1] for number in (1, 2, 8))
    assert states[0] == []
    assert len(states) == 4
    assert first.what in states[1]
    table = (tmp_path / "table.md").read_text()
    assert f"| {first.what} | `test_a` |" in table
    assert table.count("not found") == 2
    assert script.main(["--only", "1"]) == 0


def test_a_fault_that_no_longer_fits_is_named(script, tmp_path):
    fault = script.Fault("a fault", "module.py", "once", "twice")
    (tmp_path / "module.py").write_text("once, once")
    with pytest.raises(SystemExit, match="2 times, not once"):
        script.plant(tmp_path, fault)


def test_tests_that_fail_without_a_fault_are_no_result(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "run_tests", lambda folder, tests: (False, "test_a - why"))
    assert script.main(["--only", "1"]) == 2
    assert "without any fault" in capsys.readouterr().out
