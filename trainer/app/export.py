"""`svi export`: the answer of a run for other programs."""

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from trainer.app.predict import posterior_of
from trainer.errors import UserError
from trainer.posterior.export import save_guide, to_inference_data


def run(cfg: DictConfig, run_dir: Path) -> float:
    """Writes ``cfg.out``: .nc for ArviZ, .safetensors (with a .json beside it) for the mean-field guide."""
    del run_dir
    posterior, out = posterior_of(Path(str(cfg.run)), cfg.allow), Path(str(cfg.out))
    if not out.parent.is_dir():
        raise UserError(f"the folder of {out} does not exist: make it first.")
    if out.suffix == ".nc":
        draws = int(cfg.draws)
        if draws < 1:
            raise UserError(f"draws={draws} must be at least 1.")
        to_inference_data(posterior, draws, int(cfg.seed)).to_netcdf(str(out))
        said = f"{draws:,} draws for arviz.from_netcdf"
    elif out.suffix == ".safetensors":
        save_guide(posterior, out)
        said = f"the guide's parameters, and {out.with_suffix('.json').name} beside them"
    else:
        raise UserError(f"out={out} is of no known format: end it in .nc (ArviZ) or .safetensors (the guide).")
    Console(highlight=False, soft_wrap=True).print(f"{out}: {said}")
    return 0.0
