"""The posterior of a run that has ended, from its folder."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from trainer.errors import UserError
from trainer.inference.step import in_dtype
from trainer.options import build
from trainer.options.allowed import refuse_others
from trainer.posterior.posterior import Posterior
from trainer.training.precision import TYPES

POSTERIOR = "posterior.pt"
"""The file of a run folder that holds its result."""


def posterior_of(folder: Path, allow: Sequence[str] = ()) -> Posterior:
    """The result of a finished run, model and guide made from its config (see `refuse_others`).

    Raises UserError where there is none.
    """
    config = folder / ".hydra" / "resolved.yaml"
    if not config.is_file():
        raise UserError(f"run={folder} is not a run folder of svi train.")
    if not (folder / POSTERIOR).is_file():
        raise UserError(f"{folder} has no result yet: finish it with svi train run_dir={folder} ckpt_path=last.")
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, DictConfig)
    if cfg.guide.get("_target_") == "trainer.svi.guides.MeanField":  # as of 0.1
        cfg.guide._target_ = "trainer.inference.guides.mean_field.MeanField"
    refuse_others(OmegaConf.create({name: cfg[name] for name in ("model", "guide")}), allow, folder)
    with in_dtype(TYPES[cfg.dtype]):  # a class makes its modules in the run's type
        model = build.model(cfg.model)
    return Posterior.of_factory(
        folder / POSTERIOR, model, lambda columns, plate: build.guide(cfg.guide, model, columns, plate)
    )
