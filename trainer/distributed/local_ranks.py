"""The other ranks of this machine: processes that this one starts, and none of which it leaves behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from torch.distributed.elastic.utils.distributed import get_free_port

_NOTICE = 5.0  # seconds for a rank to notice by itself that another has failed


class LocalRanks:
    """Ranks 1, 2, ... of this machine, each a process of its own; none, until `start`."""

    def __init__(self) -> None:
        self.children: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()

    def start(self, command: Sequence[str], local_size: int, size: int) -> None:
        """Starts ``command`` as each rank but this one, and says in the environment where the ranks meet.

        The command is given, never taken from ``argv``, which would run a whole sweep again under ``-m``.
        """
        env = os.environ
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(get_free_port()))
        env.setdefault("NODE_RANK", "0")
        env.update(LOCAL_RANK="0", WORLD_SIZE=str(size))
        for local_rank in range(1, local_size):
            self.children.append(subprocess.Popen(command, env={**env, "LOCAL_RANK": str(local_rank)}))
        threading.Thread(target=self._watch, daemon=True).start()

    def leave(self) -> None:
        """Says that this rank has noticed the end by itself."""
        self._over.set()

    def end(self, patience: float = 0.0) -> None:
        """Waits for the others to end, up to ``patience`` seconds, then kills them."""
        self.leave()
        until = time.monotonic() + patience
        for child in self.children:
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _watch(self) -> None:
        """Ends this process when another has failed and this one does not notice, waiting for it in C++."""
        while not any(child.poll() for child in self.children):
            if self._over.wait(0.2):
                return
        if self._over.wait(_NOTICE):
            return
        rank, code = next((rank, child.returncode) for rank, child in enumerate(self.children, 1) if child.returncode)
        if code < 0:  # else it has said so itself
            name = signal.Signals(-code).name
            print(f"rank {rank} was ended by {name}; continue with ckpt_path=last.", file=sys.stderr, flush=True)
        self.end()
        os._exit(code if code > 0 else 1 if code == -signal.SIGKILL else 128 - code)
