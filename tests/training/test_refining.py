"""Integrals over rows become finer as a round ends, and the program with them; a resumed run takes them over."""

from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from trainer import Posterior, fit
from trainer.distributed.comm import ALONE
from trainer.engine.train_state import TrainState
from trainer.inference.recipe.row_integrals import LIMIT, Move
from trainer.inference.rows.integral import Fineness
from trainer.training import refining

GENERATOR = np.random.default_rng(0)
COUNTS = GENERATOR.poisson(np.exp(0.5 + GENERATOR.normal(size=1000))).astype("float32")


def counts(y):
    a = pyro.sample("a", dist.Normal(0.0, 5.0))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    with pyro.plate("data", len(y)):
        u = pyro.sample("u", dist.Normal(0.0, s))
        pyro.sample("y", dist.Poisson((a + u).exp()), obs=y)


@pytest.fixture(scope="module")
def posterior():
    options = {"guide.nodes": 1, "program": "eager"}
    return fit(counts, {"y": COUNTS}, max_steps=20, options=options, progress=False)


def test_a_fit_raises_what_is_too_coarse_and_keeps_it(posterior, tmp_path):
    fineness = posterior.inference.model.fineness
    assert fineness.points > 1
    posterior.save(tmp_path / "posterior.pt")
    assert Posterior.load(tmp_path / "posterior.pt", counts).inference.model.fineness == fineness


def test_the_end_of_a_round_raises_what_has_become_too_coarse(posterior):
    inference, heard, renewed = posterior.inference, [], []
    inference.model.refine(Fineness(1, 1))
    module = SimpleNamespace(
        inference=inference, state=SimpleNamespace(preconditioner=None), theta=posterior.theta, comm=ALONE,
        device=torch.device("cpu"), step=20, say=heard.append, renew=lambda: renewed.append(1),
    )  # fmt: skip
    record = TrainState(None)
    sample = posterior.rows.at(torch.arange(posterior.rows.size))._replace(num_obs=1000).as_group()
    refining.refine_at_end(module, sample, record)
    assert record.fineness == list(inference.model.fineness)
    assert record.fineness[1] > 1
    assert renewed == [1]
    assert heard[0].startswith("step 20: latents of rows: ")
    refining.refine_at_end(module, sample, record)
    assert len(heard) == len(renewed) == 1


def test_what_cannot_be_fine_enough_is_said():
    found = refining.Refined(Fineness(5, 1024), Move(3.0, 40.0), Move(2 * LIMIT, 1.0))
    assert refining._changed(Fineness(5, 8), found) == (
        "2,048 nodes and 4 Newton steps in place of 16 nodes and 4 Newton steps, "
        "which moves the answer by 3 sd and the ELBO by 40 nats; "
        "twice as many would move the answer by 0.1 sd more, so trust it no further"
    )
    assert refining._still(found._replace(off=Move(0.0, 0.3))) == "the ELBO is off by about 0.3 nats"
