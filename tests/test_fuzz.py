"""scripts/fuzz.py in its short form. The long one: python scripts/fuzz.py --cases
1000.
"""

import subprocess
import sys

import pytest
from source_files import ROOT


@pytest.mark.slow
def test_odd_flags_files_and_images_end_in_a_sentence():
    command = [sys.executable, str(ROOT / "scripts/fuzz.py"), "--cases", "40", "--seed", "1", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "40 cases, 0 with faults" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_fuzzer_sees_faults(tmp_path):
    """Its judgment of made-up outcomes."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import fuzz
    from fuzzing import runs

    def faults(status, output, **case):
        made = runs.Case("weights", "made up", "encode_images", [], **case)
        return fuzz.faults_of(made, fuzz.Outcome(status, output, 1.0, 0), tmp_path)

    assert faults(2, b"error: x.pth is cut off\n") == []
    assert faults(0, b"fine\n") == []
    assert faults(0, b"fine\n", must_fail=True) == ["silent success"]
    assert faults(0, b"left out a.jpg\n", must_name=True, named=("a.jpg",)) == []
    assert faults(0, b"fine\n", must_name=True, named=("a.jpg",)) == ["silent success"]
    assert "traceback" in faults(1, b"Traceback (most recent call last):\n")
    assert "control characters in the output" in faults(0, b"a\x1b[31m")
    (tmp_path / runs.CANARY).touch()
    assert "code run" in faults(0, b"")
