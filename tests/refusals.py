"""How a `main` ends that refuses what it was given."""

import contextlib
import re
from collections.abc import Iterator

import pytest

from errors import UserError, name_flags


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


@contextlib.contextmanager
def user_reads(sentence: str) -> Iterator[None]:
    """A UserError is raised whose message, as `main` prints it, has a match for
    `sentence`.
    """
    with pytest.raises(UserError) as caught:
        yield
    message = name_flags(str(caught.value))
    assert re.search(sentence, message), message
