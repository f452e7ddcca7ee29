"""How a `main` ends that refuses what it was given."""

import pytest


def refused(main, flags: list[str], capsys) -> str:
    """The one sentence with which `main` ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in error
    assert error.count("\n") == 1, error
    return error
