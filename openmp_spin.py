"""Imported before torch by every command: how long OpenMP's threads wait busily for
each other.

At the end of each parallel loop the threads that are done spin until the last one is.
GNU's OpenMP, with which torch comes, spins 300,000 times before it sleeps. On a machine
with other work to do that is the time of the very thread that is waited for, and
training falls far below its share (docs/lab/performance.md). It reads these variables
when it is loaded, so they must be set before.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS = 50_000
USERS_CHOICE = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def bound(environ: MutableMapping[str, str]) -> None:
    """Set the number of spins, unless the user has chosen how to wait."""
    if not any(name in environ for name in USERS_CHOICE):
        environ["GOMP_SPINCOUNT"] = str(SPINS)


bound(os.environ)
