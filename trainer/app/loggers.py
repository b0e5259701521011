"""Loggers by config; W&B never keeps a run waiting: no key or no server means offline, said in one line."""

import importlib.util
import os
import urllib.error
import urllib.request
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger

from trainer.app import build
from trainer.errors import UserError

_WAIT = 5  # seconds for the W&B server to answer, and for it to take the run
_FINISH = 10  # seconds for the last figures to be uploaded; what is left stays in the run folder, for wandb sync
_PACKAGES = {"MLFlowLogger": "mlflow", "TensorBoardLogger": "tensorboard", "WandbLogger": "wandb"}


def make_loggers(cfg: DictConfig, run_dir: Path) -> list[Logger] | bool:
    """The loggers of `logger=`, False for none (metrics.csv is always written).

    What they write goes under ``run_dir``, which in a sweep is the job's own and not the ``run_dir`` of the config.
    """
    cfg = OmegaConf.merge(cfg, {"run_dir": str(run_dir)})  # type: ignore[assignment]
    nodes = [node for node in cfg.logger.values() if node is not None]
    for node in nodes:
        package = _PACKAGES.get(str(node.get("_target_")).rpartition(".")[2])
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"{node._target_} needs the package {package}: pip install {package}.")
    loggers = [_wandb(node) if "WandbLogger" in str(node.get("_target_")) else build.make(node) for node in nodes]
    facts: Any = OmegaConf.to_container(cfg, resolve=True)
    for logger in loggers:
        logger.log_hyperparams(facts)
    return loggers or False


def _wandb(node: DictConfig) -> Logger:
    """A W&B logger whose run has begun: online where the server takes it within some seconds, else offline."""
    import wandb

    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # telemetry: it waits 10 s for a silent server, at exit
    wandb.finish()  # the run of the job before this one, in a sweep
    # offline is this run's affair: Lightning's offline=True would set WANDB_MODE for the jobs that follow
    options: dict[str, Any] = {
        "settings": {"init_timeout": _WAIT, "finish_timeout": _FINISH, **node.get("settings", {})}
    }
    settings = wandb.setup().settings
    if not node.get("offline") and node.get("mode", settings.mode) == "online":
        reason = _why_offline(str(settings.base_url), settings.api_key)
        if reason is None:
            try:
                return _begun(node, options)
            except wandb.Error as error:
                reason = f"the server did not take the run ({str(error).splitlines()[0]})"
        print(f"W&B: {reason}, so this run is logged offline; wandb sync uploads it later.")
        options["mode"] = "offline"
    return _begun(node, options)


def _begun(node: DictConfig, options: dict[str, Any]) -> Logger:
    logger = build.make(OmegaConf.merge(node, options))  # type: ignore[arg-type]
    _ = logger.experiment  # begins the run
    return logger


def _why_offline(base_url: str, api_key: str | None) -> str | None:
    """Why the server at ``base_url`` cannot be used; None where it answers and there is a key for it."""
    import wandb

    if not api_key and not _has_key(base_url):
        return "no API key is set"
    try:
        urllib.request.urlopen(base_url, timeout=_WAIT).close()
    except urllib.error.HTTPError:
        pass  # an answer all the same
    except (OSError, ValueError) as error:
        return f"{base_url} cannot be reached ({getattr(error, 'reason', error)})"
    try:
        return None if wandb.login(prompt=False, verify=False) else "no API key is set"
    except wandb.Error as error:
        return f"the API key cannot be used ({str(error).splitlines()[0]})"


def _has_key(base_url: str) -> bool:
    """Whether the environment or the netrc file seems to hold a key (W&B itself would ask for one)."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = [urlsplit(base_url).netloc, *(["api.wandb.ai"] if base_url == wandb.Settings().base_url else [])]
    try:
        machines = netrc(os.environ.get("NETRC")).hosts
    except (OSError, NetrcParseError):
        return False
    return any(host in machines for host in hosts)
