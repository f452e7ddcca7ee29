"""What may befall a machine while a network trains, each in one sentence: memory, other
processes, the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist

from errors import UserError
from runtime.distributed import rank, world_size

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def explain_errors(*folders: str) -> Iterator[None]:
    """`folders`: those that the run writes to; empty names are left out."""
    written = [folder for folder in folders if folder]
    before = threading.excepthook

    def hide_repeated(thread: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread passes its error to the next writer, so it arrives below
        as well: it needs no traceback of its own.
        """
        of_tensorboard = type(thread.thread).__module__.startswith("tensorboard")
        if not (isinstance(thread.exc_value, OSError) and of_tensorboard):
            before(thread)

    threading.excepthook = hide_repeated
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            "out of GPU memory: halve `batch_size` and double `update_freq`, which is the same step"
        ) from None
    except RuntimeError as error:
        raise explain_lost_process(error) from None
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        ours = bool(name) and any(name.startswith(folder) for folder in written)
        if not ours and error.errno not in DISK_ERRORS:
            raise
        raise UserError(
            f"{name or 'a file of ' + ' or '.join(written)} could not be written ({error.strerror}): the "
            "checkpoints saved before are intact. Make room, or point `output_dir` elsewhere, and start "
            "the same line again"
        ) from None
    finally:
        threading.excepthook = before


def explain_lost_process(error: RuntimeError) -> Exception:
    """A lost process as one sentence; any other error as it is."""
    text = str(error)
    if world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
        return UserError(
            f"[rank {rank()}] another process of this run was lost or did not answer within `dist_timeout`; "
            "its own message is above or in its log. Start the same line again to go on "
            f"({text.splitlines()[0][:160]})"
        )
    if "DataLoader worker" in text:
        return UserError(
            "a data process died, most likely for lack of memory: lower `num_workers` "
            f"({text.splitlines()[0][:160]})"
        )
    return error
