"""Loggers by config; W&B never keeps a run waiting: no key or no server means offline, said in one line."""

import os
import socket
from netrc import netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger

from trainer.app import build

_WAIT = 5  # seconds to reach the W&B server, twice at most


def make_loggers(cfg: DictConfig, run_dir: Path) -> list[Logger] | bool:
    """The loggers of `logger=`, False for none (metrics.csv is always written)."""
    nodes = [node for node in cfg.logger.values() if node is not None]
    loggers = [build.make(node, **_wandb_options(node)) for node in nodes]
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    del run_dir
    return loggers or False


def _wandb_options(node: DictConfig) -> dict[str, Any]:
    if "WandbLogger" not in str(node.get("_target_")) or node.get("offline"):
        return {}
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if not _has_key(host.hostname or ""):
        print("W&B: no API key is set, so this run is logged offline; wandb sync uploads it later.")
        return {"offline": True}
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=_WAIT).close()
    except OSError as error:
        print(
            f"W&B: {host.hostname} cannot be reached ({error}), so this run is logged offline; wandb sync uploads it."
        )
        return {"offline": True}
    return {}


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc().authenticators(host) is not None
    except (OSError, ValueError):
        return False
