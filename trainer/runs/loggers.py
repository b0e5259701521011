"""Loggers by config; no server keeps a run waiting: W&B logs offline without one, MLflow is left out, as is said."""

import importlib.util
import os
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger

from trainer.errors import UserError, first_line
from trainer.options import build
from trainer.options.entrance import resolved
from trainer.options.records import plain
from trainer.options.verbs import Train
from trainer.runs.secrets import redacted
from trainer.runs.server import WAIT, unreachable, why_offline
from trainer.runs.tracking import code_facts, keep_id, kept_id

_FINISH = 10  # seconds for the last figures to be uploaded; what is left stays in the run folder, for svi sync
_PACKAGES = {"MLFlowLogger": "mlflow", "TensorBoardLogger": "tensorboard", "WandbLogger": "wandb"}


def make_loggers(cfg: Train, run_dir: Path) -> list[Logger] | bool:
    """The loggers of `logger=`, False for none (metrics.csv is always written).

    What they write goes under ``run_dir``, which in a sweep is the job's own and not the ``run_dir`` of the config.
    """
    content, loggers = resolved(replace(cfg, run_dir=str(run_dir))), []
    for name, node in content.logger.items():
        if node is None:
            continue
        if "_target_" not in node:
            raise UserError(f"logger.{name} is set, but there is no such logger in this run: add logger={name}.")
        kind = str(node.get("_target_")).rpartition(".")[2]
        package = _PACKAGES.get(kind)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"{node._target_} needs the package {package}: pip install {package}.")
        logger = _MAKERS.get(kind, _plain)(node, run_dir)
        if logger is not None:
            loggers.append(logger)
    facts: Any = redacted(plain(content))
    for logger in loggers:
        if not getattr(logger, "goes_on", False):  # MLflow refuses the options of a resumed run with others
            logger.log_hyperparams({**facts, "code": code_facts()})
    return loggers or False


def _plain(node: DictConfig, _run_dir: Path) -> Logger:
    logger: Logger = build.make(node)
    return logger


def _mlflow(node: DictConfig, run_dir: Path) -> Logger | None:
    """An MLflow logger whose run has begun, the one of this folder before; None where its server does not answer."""
    for name, value in (("MAX_RETRIES", "1"), ("TIMEOUT", str(WAIT))):  # else a silent server holds us for minutes
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    uri = str(node.get("tracking_uri"))
    reason = unreachable(uri) if uri.startswith("http") else None
    if reason is not None:
        print(f"MLflow: {reason}, so this run is logged without it; metrics.csv has the metrics.")
        return None
    known = kept_id(run_dir, "mlflow")
    logger = build.make(OmegaConf.merge(node, {"run_id": known} if known else {}))  # type: ignore[arg-type]
    try:
        client, logger.goes_on = logger.experiment, known is not None
        client.update_run(logger.run_id, status="RUNNING")
    except Exception as error:
        said = first_line(error)
        raise UserError(f"MLflow at {uri} cannot be used ({said}): fix it, or train with logger=none.") from None
    keep_id(run_dir, "mlflow", logger.run_id)
    finalize = logger.finalize

    def finalize_or_say(status: str) -> None:
        try:
            finalize(status)
        except Exception as error:  # a server that went away does not make a finished run a failed one
            print(f"MLflow does not take the end of the run ({first_line(error)}); the run folder has it all.")

    logger.finalize = finalize_or_say
    made: Logger = logger
    return made


def _wandb(node: DictConfig, run_dir: Path) -> Logger:
    """A W&B logger whose run has begun, the one of this folder before: online where the server takes it within some
    seconds, else offline.
    """
    import wandb

    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # telemetry: it waits 10 s for a silent server, at exit
    wandb.finish()  # the run of the job before this one, in a sweep
    # offline is this run's affair: Lightning's offline=True would set WANDB_MODE for the jobs that follow
    options: dict[str, Any] = {
        "settings": {"init_timeout": WAIT, "finish_timeout": _FINISH, **node.get("settings", {})},
        "group": node.get("group") or _group(run_dir),
        "resume": node.get("resume") or "allow",
    }
    if not (node.get("id") or os.environ.get("WANDB_RUN_ID") or os.environ.get("WANDB_SWEEP_ID")):
        options["id"] = kept_id(run_dir, "wandb") or uuid.uuid4().hex[:8]
        keep_id(run_dir, "wandb", options["id"])
    settings = wandb.setup().settings
    if not node.get("offline") and node.get("mode", settings.mode) == "online":
        reason = why_offline(str(settings.base_url), settings.api_key)
        if reason is None:
            try:
                return _begun(node, options)
            except wandb.Error as error:
                reason = f"the server did not take the run ({first_line(error)})"
        print(f"W&B: {reason}, so this run is logged offline; svi sync {run_dir} uploads it later.")
        options["mode"] = "offline"
    return _begun(node, options)


def _begun(node: DictConfig, options: dict[str, Any]) -> Logger:
    logger = build.make(OmegaConf.merge(node, options))  # type: ignore[arg-type]
    _ = logger.experiment  # begins the run
    made: Logger = logger
    return made


def _group(run_dir: Path) -> str | None:
    """What the runs of one sweep, or of one Slurm job, have in common."""
    if (run_dir.parent / "multirun.yaml").exists():
        return run_dir.parent.name
    return os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")


_MAKERS: dict[str, Callable[[DictConfig, Path], Logger | None]] = {"WandbLogger": _wandb, "MLFlowLogger": _mlflow}
