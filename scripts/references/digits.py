"""A variational autoencoder of handwritten digits: `python -m scripts.references.digits [--width H] [--codes Z] ...`.

Pyro's tutorial on the digits that scikit-learn ships (1,797 images of 64 pixels, on or off), at equal steps: the
tutorial's guide in Pyro's own loop, and the encoder that the trainer builds of the same width. For each the ELBO a row
(nats) at the end, over all rows and many draws, and the steps a second, without what compiling takes.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import softplus

from trainer import fit
from trainer.errors import UserError

_DRAWS = 200


class Result(NamedTuple):
    elbo: float
    """A row, in nats."""
    steps_per_second: float


class VAE:
    """Of Pyro's tutorial: ``width`` hidden numbers on either side of ``codes`` of each image."""

    def __init__(self, pixels: int, width: int, codes: int):
        self.codes = codes
        self.decoder = nn.Sequential(nn.Linear(codes, width), nn.Softplus(), nn.Linear(width, pixels))
        self.hidden, self.loc, self.log_scale = (
            nn.Linear(*sizes) for sizes in ((pixels, width), (width, codes), (width, codes))
        )
        self.encoder = nn.ModuleList([self.hidden, self.loc, self.log_scale])

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), self.codes), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            hidden = softplus(self.hidden(x))
            pyro.sample("z", dist.Normal(self.loc(hidden), self.log_scale(hidden).exp()).to_event(1))


class Setting(NamedTuple):
    width: int = 64
    codes: int = 20
    steps: int = 1000
    batch_size: int = 256
    lr: float = 1e-3


def by_pyro(x: np.ndarray, setting: Setting, seed: int) -> Result:
    """The tutorial's loop."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    rows, vae = torch.tensor(x), VAE(x.shape[1], setting.width, setting.codes)
    with pyro.validation_enabled(False):
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": setting.lr}), Trace_ELBO())
        loader = torch.utils.data.DataLoader(rows, setting.batch_size, shuffle=True)
        done, began = 0, time.perf_counter()
        while done < setting.steps:
            for batch in loader:
                svi.step(batch)
                done += 1
                if done == setting.steps:
                    break
        seconds = time.perf_counter() - began
        elbo = -float(np.mean([svi.evaluate_loss(rows) for _ in range(_DRAWS)])) / len(x)
    pyro.clear_param_store()
    return Result(elbo, setting.steps / seconds)


def by_the_trainer(x: np.ndarray, setting: Setting, seed: int, **options: Any) -> Result:
    """The encoder that it builds, of the same width."""
    torch.manual_seed(seed)
    vae = VAE(x.shape[1], setting.width, setting.codes)

    def model(x: Tensor) -> None:
        vae.model(x)

    asked = {"guide.rows": "amortise", "guide.widths": [setting.width], "optimizer.lr": setting.lr, **options}
    sizes = {"batch_size": setting.batch_size, "max_steps": setting.steps}
    posterior = fit(model, {"x": x}, seed=seed, progress=False, dtype="float32", options=asked, **sizes)
    return Result(posterior.metrics["elbo_per_row"], setting.steps / posterior.metrics["seconds"])


def digits() -> np.ndarray:
    """float32 [1797, 64], 0 or 1. Raises UserError where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits are scikit-learn's, which is not installed: pip install scikit-learn.") from None
    pixels: np.ndarray = load_digits().data
    return (pixels > 7).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in Setting._field_defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = vars(parser.parse_args())
    torch.set_num_threads(given.pop("threads"))
    seeds, x = range(given.pop("seeds")), digits()
    setting = Setting(**given)
    compiled = {"program": "fused", "threads": torch.get_num_threads()}
    ways: dict[str, Callable[[int], Result]] = {
        "Pyro's loop, the tutorial's guide": lambda seed: by_pyro(x, setting, seed),
        "the trainer's encoder": lambda seed: by_the_trainer(x, setting, seed, **compiled),
        "the same, one draw a step": lambda seed: by_the_trainer(
            x, setting, seed, **compiled, **{"objective.antithetic": False}
        ),
    }
    for name, way in ways.items():
        found = [way(seed) for seed in seeds]
        elbos, speeds = (
            ", ".join(f"{each:{form}}" for each in some) for some, form in zip(zip(*found), (".3f", ",.0f"))
        )
        print(f"{name:36s} ELBO a row {elbos}  steps/s {speeds}", flush=True)


if __name__ == "__main__":
    main()
