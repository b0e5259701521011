"""One rank fails, all leave, and the cause alone is told.

A rank whose partner is gone fails in its next collective, in words that say nothing of the cause. So the first rank to
fail writes its exit code into the store of the process group, where the others find it and leave without a word. Where
they find nothing, each writes there that it waits; who does not is named.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from trainer.distributed.waiting import interruptible
from trainer.errors import RankLost, Stopped, UserError, exit_code, first_line

_GRACE = 3.0  # seconds for the others to say that they wait, or to read what was told
_ANSWER = 5.0  # seconds for the store to answer
_COLLECTIVE = re.compile(r"gloo|nccl|connection|broken pipe|timed? ?out|the compiled step failed", re.IGNORECASE)
Answer = TypeVar("Answer")


def explained(error: BaseException) -> BaseException:
    """What this rank raises in place of ``error``: itself where it is the cause and the first, else a RankLost.

    An error that all ranks raise alike is told by the first. Asked again, also once the group has ended, it answers
    as it did.
    """
    if "explained" not in vars(error):
        told = _explained(error)
        vars(error)["explained"] = None if told is error else told
    return vars(error)["explained"] or error


def _explained(error: BaseException) -> BaseException:
    if not dist.is_available() or isinstance(error, RankLost):
        return error
    if not dist.is_initialized():
        return _of_the_meeting(error) if isinstance(error, dist.DistError) else error
    if dist.get_world_size() < 2 or (isinstance(error, Stopped) and error.agreed):
        return error
    store, rank = _get_default_store(), dist.get_rank()
    if not _of_a_collective(error):
        first = _asked(lambda: store.compare_set("failed", "", f"{rank} {exit_code(error)}"))
        if first is None or first.decode().split()[0] == str(rank):
            return error
        return RankLost("", int(first.decode().split()[1]), faultless=isinstance(error, Stopped))
    return _of_the_others(store, rank, error)


def _of_the_others(store: Store, rank: int, error: BaseException) -> RankLost:
    """What this rank raises for an ``error`` of a collective, which tells that others are gone."""
    found = _asked(lambda: _who(store, rank, dist.get_world_size()), _GRACE + _ANSWER)
    if found is None:
        return RankLost(_sentence("rank 0 no longer answers", error))
    code, silent = found
    if code is not None:
        return RankLost("", code)
    if rank != min(set(range(dist.get_world_size())) - set(silent), default=rank):
        return RankLost("")
    names = ", ".join(map(str, silent))
    said = f"rank {names} no longer answers" if len(silent) == 1 else f"ranks {names} no longer answer"
    return RankLost(_sentence(said if silent else "the ranks lost each other", error))


def leave_group(together: bool) -> None:
    """Ends the process group, where there is one; ``together``: once every rank is here.

    Else the store, which rank 0 holds, stays a moment for the others to read what was told.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    store, others, rank = _get_default_store(), dist.get_world_size() - 1, dist.get_rank()
    if together:
        interruptible(dist.barrier)
    dist.destroy_process_group()
    if not together and rank == 0:
        until = time.monotonic() + _GRACE
        while time.monotonic() < until and (_asked(lambda: store.add("read", 0)) or 0) < others:
            time.sleep(0.05)


def _who(store: Store, rank: int, size: int) -> tuple[int | None, list[int]]:
    """The exit code that was told, or None and the ranks that do not say that they wait."""
    store.set(f"waiting {rank}", "")
    until = time.monotonic() + _GRACE
    silent = list(range(size))
    while silent and time.monotonic() < until and not store.check(["failed"]):
        time.sleep(0.05)
        silent = [each for each in silent if not store.check([f"waiting {each}"])]
    code = int(store.get("failed").decode().split()[1]) if store.check(["failed"]) else None
    store.add("read", 1)
    return code, silent


def _asked(question: Callable[[], Answer], seconds: float = _ANSWER) -> Answer | None:
    """The store's answer, or None where it has none in time: it lives in a process that may be gone or stopped."""
    answers: list[Answer] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # of a connection that is no more
            answers.append(question())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _of_a_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _COLLECTIVE.search(str(error)) is not None


def _of_the_meeting(error: Exception) -> UserError:
    """What the user can do where the ranks did not find each other."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if "EADDRINUSE" in str(error):
        return UserError(f"port {port} of {host} is taken, where the ranks are to meet: set MASTER_PORT to a free one.")
    return UserError(
        f"the ranks did not find each other at port {port} of {host} within trainer.timeout=: svi doctor tells more "
        f"({first_line(error)})."
    )


def _sentence(what: str, error: BaseException) -> str:
    waited = " within trainer.timeout=" if re.search(r"timed? ?out", str(error), re.IGNORECASE) else ""
    return (
        f"{what}{waited}: it was killed (out of memory?) or stopped, or its machine or the network failed; "
        "continue with ckpt_path=last."
    )
