"""`svi` with a training of 0.2 s that gets SIGKILL, once, where there is a file "die"."""

import os
import signal
import sys
import time
from pathlib import Path

from trainer import cli
from trainer.verbs import train


def run(cfg, run_dir):
    time.sleep(0.2)
    marker = Path("die")
    if marker.exists():
        marker.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return -abs(cfg.optimizer.lr - 0.1)


if __name__ == "__main__":
    train.run = run
    cli.main(sys.argv[1:])
