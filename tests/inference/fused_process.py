"""Run by test_compiling.py, not a test: prepares the same step in a process of its own, and names others.

`python fused_process.py FOLDER` prints JSON: what was said, the state after 6 steps, and the key of each problem; the
model of one of them lies in a file in FOLDER.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from svi_problems import batch_of, build, chunk_of, regression
from torch import Tensor

import trainer.inference.programs.fused as fused_module
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.inference.model.ragged import Csr, Ragged
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.optim.optimizers import SGD, Adam
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.programs.compiling import Compilation, key
from trainer.inference.programs.fused import Fused
from trainer.inference.programs.scan import Recipe
from trainer.inference.setup import set_up

SLOTS, ROWS = 6, 8


def dense() -> Batch:
    """Of `regression`: x [6, 1, 8, 2] and y [6, 1, 8]."""
    return chunk_of(SLOTS, 1, ROWS, torch.float32, x=(2,), y=())


def varying() -> Batch:
    """A csr and a ragged column of two entries a row, beside the dense y."""
    chunk = dense()
    offsets = torch.arange(0, 2 * ROWS + 1, 2).expand(SLOTS, 1, -1).contiguous()
    places = torch.arange(2 * ROWS).remainder(2).expand(SLOTS, 1, -1).contiguous()
    given = {"x": Csr(offsets, torch.ones(SLOTS, 1, 2 * ROWS), places, 2), "words": Ragged(offsets, places)}
    return chunk._replace(columns={**given, "y": chunk.columns["y"]})


def of_words(x: Any, words: Any, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + words.total(w[words.values]), 1.0), obs=y)


class WithConstants:
    """A tensor and a number that the tracer lifts out of the graph."""

    def __init__(self, scale: float):
        self.shift, self.scale = torch.tensor([0.5, -0.5]), torch.tensor(scale)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(self.shift, self.scale).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def guide_of_mine(x: Tensor, y: Tensor) -> None:
    pyro.sample("w", dist.Normal(pyro.param("m", torch.zeros(2)), 0.1).to_event(1))


def mine(_: PlatedModel, batch: Batch) -> PyroGuide:
    return PyroGuide(PlatedModel(guide_of_mine, batch.columns))


def from_a_file(folder: Path) -> Any:
    """`regression` as a file of the user's."""
    source = """
import pyro
import pyro.distributions as dist

def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[-1]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)
"""
    path = folder / "model_of_mine.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("model_of_mine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.regression


def program(model: Any, chunk: Batch, guide: Any = MeanField, update: Any = None) -> tuple[Fused, Any]:
    columns = {name: column[0, 0] if isinstance(column, Tensor) else column[0][0]
               for name, column in chunk.columns.items()}  # fmt: skip
    update = update or one_round(Adam(lr=0.01), Constant(), 10, 5)
    if guide is MeanField:
        inference, theta = build(model, num_obs=1000, **columns)
    else:
        batch = batch_of(**columns)
        inference, theta = set_up(model, guide, batch, 1000, ELBO("monte_carlo", antithetic=False))
    return Fused(inference, update, 0, [0]), update.init(theta)


class _Named:
    """In place of a `Compilation`: keeps the key alone."""

    def __init__(self, recipe: Recipe, say: Any):
        self.key = key(recipe)

    def abandon(self) -> None:
        pass


def key_of(fused: Fused, state: Any, chunk: Batch) -> str:
    """The name of the compiled step, which is not compiled."""
    fused_module.Compilation = _Named  # type: ignore[misc, assignment]
    try:
        fused.begin(state, chunk)
    finally:
        fused_module.Compilation = Compilation  # type: ignore[misc]
    assert isinstance(fused._compilation, _Named)
    return fused._compilation.key


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    said: list[str] = []
    fused, state = program(regression, dense())
    fused.prepare(state, dense(), said.append)
    theta = fused.run(state, dense(), SLOTS).state.theta
    problems = {
        "regression": (*program(regression, dense()), dense()),
        "regression of a file": (*program(from_a_file(folder), dense()), dense()),
        "csr and ragged": (*program(of_words, varying()), varying()),
        "constants": (*program(WithConstants(1.0), dense()), dense()),
        "other constants": (*program(WithConstants(2.0), dense()), dense()),
        "a guide of mine": (*program(regression, dense(), mine), dense()),
        "another optimizer": (*program(regression, dense(), update=one_round(SGD(), Constant(), 10, 5)), dense()),
    }
    keys = {name: key_of(*problem) for name, problem in problems.items()}
    print(json.dumps({"said": said, "theta": theta.tolist(), "keys": keys}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
