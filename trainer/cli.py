"""`svi VERB key=value ...`: one Hydra program a verb."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from trainer.app.config import config_folder, register_open_nodes
from trainer.app.ranks import launched_rank
from trainer.errors import UserError

VERBS = {
    "shard": "pack a table into shards",
    "verify": "check every hash of a shard folder",
    "train": "fit a model to a shard folder",
    "predict": "new observations at the rows of a table",
    "export": "the answer for ArviZ, or as safetensors",
}


def main(argv: list[str] | None = None) -> None:
    """Runs one verb. Exit codes: 0 done, 1 failed, 2 a mistake that the user can mend, 128 + n stopped by signal n."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) == 2 and arguments[0] == "child":
        _guarded("train", lambda: _child(Path(arguments[1])), debug=False)
        return
    if not arguments or arguments[0] not in VERBS:
        print("usage: svi VERB key=value ...\n")
        print("\n".join(f"  svi {verb:<8} {what}" for verb, what in VERBS.items()))
        print("\nsvi VERB --help lists its options.")
        sys.exit(0 if not arguments or arguments[0] in ("-h", "--help") else 2)
    verb, *overrides = arguments
    if launched_rank():  # rank 0 writes Hydra's files, the others take its folder
        overrides += [
            "hydra.output_subdir=null",
            "hydra.run.dir=.",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        ]
    register_open_nodes()
    sys.argv = [f"svi {verb}", *overrides]
    hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=verb)(_task(verb))()


def _task(verb: str) -> Callable[[DictConfig], float]:
    def task(cfg: DictConfig) -> float:
        run = import_module(f"trainer.app.{verb}").run
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        return _guarded(verb, lambda: run(cfg, run_dir), bool(cfg.get("debug")))

    return task


def _child(run_dir: Path) -> float:
    """A rank that Lightning launched: it starts from the run's saved config."""
    cfg = OmegaConf.load(run_dir / ".hydra" / "resolved.yaml")
    assert isinstance(cfg, DictConfig)
    return import_module("trainer.app.train").run(cfg, run_dir)


def _guarded(verb: str, work: Callable[[], float], debug: bool) -> float:
    try:
        return work()
    except (UserError, FloatingPointError) as error:
        if debug:
            raise
        if launched_rank() == 0:
            print(f"svi {verb}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
