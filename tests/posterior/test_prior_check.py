"""A prior on another scale than the data is seen in its own units."""

import pyro
import pyro.distributions as dist
import torch
from svi_problems import F64, batch_of, build, regression, regression_data

from trainer.posterior.prior_check import far_from_prior

DATA = regression_data(orthogonal=False)


def narrow(x, y):
    """One slope has a prior of sd 0.1; a positive latent has its prior in log space."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), x.new_tensor([2.0, 0.1, 2.0])).to_event(1))
    s = pyro.sample("s", dist.LogNormal(x.new_zeros(()), 0.2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, s), obs=y)


def at(model, locations):
    inference, theta = build(model, **DATA)
    values = dict(inference.parameters.unflatten(theta))
    values["guide.loc"] = torch.tensor(locations, dtype=F64)
    return far_from_prior(inference, inference.parameters.flatten(values), batch_of(**DATA))


def test_the_furthest_site_is_named_in_its_priors_sds():
    (first, second) = at(narrow, [1.0, -0.7, 3.0, 1.2])
    assert first.startswith('"w" lies 7 prior sds from the mean of its prior')
    assert second.startswith('"s" lies 6 prior sds')
    assert at(narrow, [9.0, 0.4, 3.0, 0.9]) == []
    assert at(regression, [1.0, 1.0, 1.0]) == []
