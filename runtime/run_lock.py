"""One run in one output_dir: a lock file that says who has it, and that no killed run
leaves behind for good.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"
NOT_OFFERED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # by file systems without locks


class RunLock:
    """output_dir/run.lock, held from here to `release` or to the end of the process,
    however it ends.

    The kernel's lock (fcntl) is the truth on this machine: it ends with the process,
    and processes started by it do not share it. Where there is none, and for other
    machines, which it may not reach, the file says who holds it. UserError with host,
    process and start where another run does.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.me = {
            "host": socket.gethostname(),
            "boot": boot_id(),
            "pid": os.getpid(),
            "process_started": started(os.getpid()),
        }
        self.handle: int | None = None
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self.require_free(handle)
            except BaseException:
                os.close(handle)
                raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                    break
            os.close(handle)  # its holder removed it in between
        self.handle = handle
        atexit.register(self.release)

    def require_free(self, handle: int) -> None:
        locked = lock(handle)
        holder = read_holder(handle)
        here = holder.get("boot") == self.me["boot"] and holder.get("host") == self.me["host"]
        if locked is False:
            raise self.refusal(holder, "it must end first, or take another `output_dir`")
        if not holder or (holder.get("pid") == self.me["pid"] and here):
            return
        if holder.get("boot") and holder["boot"] == self.me["boot"] and locked:
            return  # of this machine, and it does not hold the lock: killed
        if holder.get("host") == self.me["host"]:
            alive = here and started(holder.get("pid")) == holder.get("process_started")
            if locked or not alive:  # killed, or the machine was restarted
                return
            raise self.refusal(holder, "it must end first, or take another `output_dir`")
        raise self.refusal(holder, f"if it is gone, remove {self.path}; else take another `output_dir`")

    def refusal(self, holder: dict[str, Any], way_out: str) -> UserError:
        who = (
            f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
            if "since" in holder
            else "another process"
        )
        return UserError(f"`output_dir` {self.path.parent} is in use by a run ({who}): {way_out}")

    def sign(self) -> None:
        """Say who holds it. Apart from taking it: a full disk must not hinder the
        removal of what fills it.
        """
        assert self.handle is not None
        os.ftruncate(self.handle, 0)
        text = json.dumps(self.me | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n"
        os.lseek(self.handle, 0, os.SEEK_SET)
        os.write(self.handle, text.encode())

    def release(self) -> None:
        if self.handle is not None and os.getpid() == self.me["pid"]:  # not by a fork of it
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self.handle), os.stat(self.path)):
                    self.path.unlink()
            os.close(self.handle)
            self.handle = None
        atexit.unregister(self.release)


def find_holder(folder: Path) -> dict[str, Any]:
    """Who trains into `folder` now, {} for nobody: for readers, which take no lock. A
    holder on another machine counts as alive.
    """
    try:
        with open(folder / NAME, "rb") as file:
            holder = read_holder(file.fileno())
    except OSError:
        return {}
    if holder.get("host") == socket.gethostname():
        alive = started(holder.get("pid")) == holder.get("process_started")
        return holder if alive and holder.get("boot") == boot_id() else {}
    return holder


def lock(handle: int) -> bool | None:
    """True: locked; False: another process has it; None: there are no locks here. Not
    flock: children would share it.
    """
    if fcntl is None:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NOT_OFFERED:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def read_holder(handle: int) -> dict[str, Any]:
    """Who signed the file; {} for an empty or half-written one."""
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        holder = json.loads(os.read(handle, 4096))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and {"host", "pid", "since"} <= holder.keys() else {}


def boot_id() -> str:
    """Which start of which machine this is, in a container too; "" where Linux does not
    tell.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def started(pid: Any) -> str | None:
    """When a process started, as a mark that no other process of its number has; None:
    there is no such process.
    """
    try:
        state, *numbers = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else numbers[18]
    except (OSError, ValueError, TypeError, IndexError):
        pass
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return ""
    except (OSError, ValueError, TypeError, OverflowError):
        return None
    return ""
