"""`svi train`: a model and a shard folder in, a run folder out."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from trainer.distributed.failure import explained, leave_group
from trainer.distributed.launch import is_restarted
from trainer.distributed.ranks import agree_on, on_cuda, world
from trainer.engine import checkpoint
from trainer.engine.signals import StopOnSignal
from trainer.errors import RankLost, Stopped
from trainer.options.verbs import Train
from trainer.training.prepare import Context
from trainer.training.run import quiet_lightning, train
from trainer.training.threads import share_threads

_LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


def run(cfg: Train, run_dir: Path) -> float:
    """Trains, writes the run folder, and returns the held-out ELBO per row (the ELBO per row without held-out rows).

    Raises `Stopped`, which exits with 128 + the signal's number, when a signal ended the run, after saving; where
    another rank was the first to fail, RankLost.
    """
    here = world(cfg.trainer)
    threads = share_threads(here.local_size, cfg.threads)
    backend, timeout = "nccl" if on_cuda(cfg.trainer) else "gloo", timedelta(seconds=cfg.trainer.timeout)
    quiet_lightning()
    before = {name: os.environ.get(name) for name in _LAUNCHER_VARIABLES}
    try:
        with StopOnSignal() as signals:
            try:
                run_dir = Path(agree_on(str(run_dir.absolute()), here, backend, timeout))
                if is_restarted() and (cfg.ckpt_path is None or checkpoint.manifests(run_dir / "checkpoints")):
                    cfg = replace(cfg, ckpt_path="last")  # the file that the first launch began with is behind it
                console = Console(quiet=here.rank != 0, highlight=False, soft_wrap=True)
                _, finish = train(cfg, Context(run_dir, here, threads, console, signals))
                signals.check()
                return finish.headline
            except BaseException as error:
                told = explained(error)
                if isinstance(told, (Stopped, RankLost)):
                    signals.ignore()
                leave_group(together=False)
                if isinstance(told, Stopped) and (here.rank == 0 or not told.agreed):
                    print(told, flush=True)
                raise told from (None if told is error else error)
    finally:
        for name, value in before.items():  # a later run of this process (a sweep) launches its own ranks
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
