"""`svi export`: the posterior of a run for other programs."""

from pathlib import Path

from rich.console import Console

from trainer.errors import UserError, counted
from trainer.options.verbs import Export
from trainer.posterior.export import save_guide, to_inference_data
from trainer.training.finished import posterior_of


def run(cfg: Export, run_dir: Path) -> float:
    """Writes ``cfg.out``: .nc for ArviZ, .safetensors (with a .json beside it) for the mean-field guide."""
    del run_dir
    posterior, out = posterior_of(Path(cfg.run), cfg.allow), Path(cfg.out)
    if not out.parent.is_dir():
        raise UserError(f"the folder of {out} does not exist: make it first.")
    if out.suffix == ".nc":
        to_inference_data(posterior, cfg.draws, cfg.seed).to_netcdf(str(out))
        said = f"{counted(cfg.draws, 'draw')} for arviz.from_netcdf"
    elif out.suffix == ".safetensors":
        save_guide(posterior, out)
        said = f"the guide's parameters, and {out.with_suffix('.json').name} beside them"
    else:
        raise UserError(f"out={out} is of no known format: end it in .nc (ArviZ) or .safetensors (the guide).")
    Console(highlight=False, soft_wrap=True).print(f"{out}: {said}")
    return 0.0
