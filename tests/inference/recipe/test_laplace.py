"""Laplace's start: the mode and the curvature of problems that have them in closed form, and None for the others."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from svi_problems import F64, build, one_group, regression, regression_data, regression_posterior
from torch.distributions import constraints

from trainer.inference.guides.pyro_guides import PyroGuide
from trainer.inference.model.noise import element_noise
from trainer.inference.optim.optimizers import SGD
from trainer.inference.optim.rounds import one_round
from trainer.inference.optim.schedules import Constant
from trainer.inference.optim.variance_reduction import Preconditioner
from trainer.inference.recipe.laplace import _factor, laplace_start, preconditioner_at

DATA = regression_data(orthogonal=False)


def started(model, data=DATA, num_obs=None, guide=None, say=lambda sentence: None):
    inference, theta = build(model, **({} if guide is None else {"guide": guide}), num_obs=num_obs, **data)
    return inference, laplace_start(inference, theta, one_group(**data), say)


def test_a_gaussian_posterior_is_met_exactly():
    """Location: the posterior mean; scale: 1 / sqrt of the precision's diagonal; L L': the covariance."""
    inference, (theta, preconditioner) = started(regression)
    mean, covariance, _ = regression_posterior(**DATA)
    sd = torch.linalg.inv(covariance).diagonal().rsqrt()
    values = inference.parameters.unflatten(theta)
    torch.testing.assert_close(values["guide.loc"], mean, rtol=0, atol=1e-6 * float(sd.min()))
    torch.testing.assert_close(values["guide.log_scale"], sd.log(), rtol=0, atol=1e-9)
    torch.testing.assert_close(preconditioner.factor @ preconditioner.factor.T, covariance, rtol=1e-9, atol=1e-12)
    # The prior's KL is exact, so the draws estimate the likelihood alone.
    of_rows = torch.linalg.inv(covariance) - torch.eye(3, dtype=F64) / 4
    torch.testing.assert_close(preconditioner.curvature, of_rows, rtol=1e-9, atol=1e-9)
    again = preconditioner_at(inference, theta, one_group(**DATA))
    torch.testing.assert_close(again.factor, preconditioner.factor, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(again.curvature, of_rows, rtol=1e-9, atol=1e-9)


def test_a_sample_stands_for_all_rows():
    """At N = 10 n the likelihood counts ten times."""
    inference, (theta, _) = started(regression, num_obs=120)
    precision = 10 * DATA["x"].T @ DATA["x"] / 0.25 + torch.eye(3, dtype=F64) / 4
    found = inference.parameters.unflatten(theta)["guide.log_scale"]
    torch.testing.assert_close(found, -0.5 * precision.diagonal().log(), rtol=0, atol=1e-9)


def scaled(x, y):
    """y ~ Normal(0, s), a flat prior on log s: mode of log s at the root mean square, curvature 2 n."""
    log_s = pyro.sample("log_s", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(0.0 * x[:, 0], log_s.exp()), obs=y)


def test_a_posterior_that_is_not_gaussian():
    inference, (theta, _) = started(scaled)
    values = inference.parameters.unflatten(theta)
    y = DATA["y"]
    assert float(values["guide.loc"]) == pytest.approx(0.5 * float((y**2).mean().log()), abs=1e-7)
    assert float(values["guide.log_scale"].exp()) == pytest.approx((2 * len(y)) ** -0.5, rel=1e-6)


def flat_logistic(x, y):
    w = pyro.sample("w", dist.ImproperUniform(constraints.real, (), (3,)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=(x[:, 0] > 0).to(x))


def ridge(x, y):
    a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), ()))
    b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
    c = pyro.sample("c", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + b + 0.0 * c * x[:, 0], 1.0), obs=y)


def with_param(x, y):
    pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    bias = pyro.param("bias", torch.zeros((), dtype=x.dtype))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(bias + x[:, 0], 1.0), obs=y)


def with_noise(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w + torch.randn_like(y), 1.0), obs=y)


def wide(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(257), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[0] + x[:, 0], 1.0), obs=y)


@pytest.mark.parametrize("model", [with_param, with_noise, wide])
def test_where_there_is_no_curvature_to_take_there_is_no_start(model):
    """Other parameters beside the guide's, noise of the model's own, many latents."""
    assert started(model)[1] is None


@pytest.mark.parametrize("model", [flat_logistic, ridge])
def test_without_a_mode_theta_stays_and_steps_are_plain_ones(model):
    """A separable problem, a latent that nothing informs: in a quarter of a coordinate, without a control variate."""
    inference, start = started(model)
    _, theta = build(model, **DATA)
    assert start is not None
    assert torch.equal(start[0], theta)
    size = inference.guide.size
    assert torch.equal(start[1].factor, 0.25 * torch.eye(size, dtype=F64))
    assert torch.equal(start[1].curvature, torch.zeros(size, size, dtype=F64))


def test_the_curvature_of_a_round_is_the_mean_under_the_guide():
    """For y ~ Normal(0, exp(v)) that of v is 2 sum(y^2) exp(-2 v), here at the same few v."""
    inference, (theta, _) = started(scaled)
    wide_guide = theta.clone()
    wide_guide[1] = -0.5
    eps = element_noise(0, torch.zeros((), dtype=torch.int64), torch.arange(8), 1, F64)
    v = theta[0] + torch.tensor(-0.5, dtype=F64).exp() * torch.cat([eps, -eps])
    want = 2 * (DATA["y"] ** 2).sum() * (-2 * v).exp().mean()
    found = preconditioner_at(inference, wide_guide, one_group(**DATA))
    assert float(found.factor) == pytest.approx(float(want**-0.5), rel=1e-10)


def test_another_guide_has_none():
    guide = lambda plated, batch: PyroGuide(AutoNormal(plated))  # noqa: E731
    assert started(regression, guide=guide)[1] is None


def test_a_step_is_made_in_whitened_coordinates():
    """Gradient descent on v, loc = L v, for the first parameters, plain for the others; the factor stays."""
    theta, grad = torch.tensor([1.0, -2.0, 0.5], dtype=F64), torch.tensor([0.3, 0.7, -0.2], dtype=F64)
    factor = torch.tensor([[0.5, 0.0], [-0.4, 2.0]], dtype=F64)
    update = one_round(SGD(lr=0.1), Constant(), 10, 10, whitened=True)
    state = update.init(theta, Preconditioner(factor, torch.eye(2, dtype=F64)))
    made = update.at(0)(state, grad, update.at(0).rates(state.step, 1.0))
    first = theta[:2] - 0.1 * factor @ factor.T @ grad[:2]
    torch.testing.assert_close(made.theta, torch.cat([first, theta[2:] - 0.1 * grad[2:]]), rtol=1e-14, atol=0)
    assert torch.equal(made.preconditioner.factor, factor)
    assert made.moments.keys() == {"velocity"}


def test_the_other_parameters_step_in_their_units():
    theta, grad = torch.tensor([1.0, -2.0, 0.5], dtype=F64), torch.tensor([0.3, 0.7, -0.2], dtype=F64)
    parts = Preconditioner(torch.eye(1, dtype=F64), torch.eye(1, dtype=F64), torch.tensor([2.0, 0.5], dtype=F64))
    update = one_round(SGD(lr=0.1), Constant(), 10, 10, whitened=True)
    state = update.init(theta, parts)
    made = update.at(0)(state, grad, update.at(0).rates(state.step, 1.0))
    want = theta - 0.1 * torch.tensor([1.0, 4.0, 0.25], dtype=F64) * grad
    torch.testing.assert_close(made.theta, want, rtol=1e-14, atol=0)
    assert torch.equal(made.preconditioner.units, parts.units)


def test_where_the_hessian_is_singular_steps_are_scaled_alone():
    scale = torch.tensor([2.0, 3.0], dtype=F64)
    hessian = torch.ones(2, 2, dtype=F64) / scale[:, None] / scale
    assert torch.equal(_factor(hessian, scale), scale.diag())


def apart(x, y):
    """Two intercepts that only priors tell apart, a hundred times as wide as what the data say of their sum."""
    a = pyro.sample("a", dist.Normal(x.new_zeros(()), 15.0))
    b = pyro.sample("b", dist.Normal(x.new_zeros(2), 15.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + b[1] + b[0] * x[:, 0], 0.5), obs=y)


def never_apart(x, y):
    a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), ()))
    b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def test_what_a_mean_field_guide_cannot_describe_is_said():
    """Separable data, a ridge that priors bound, one that nothing bounds; nothing is said of a problem without."""
    said: list[str] = []
    started(flat_logistic, say=said.append)
    assert 'no maximum along "w[' in said[0]
    assert "separable" in said[0]
    started(apart, say=said.append)
    assert '"a" and "b[1]" are strongly correlated' in said[1] or '"b[1]" and "a" are' in said[1]
    times = int(said[1].split("up to ")[1].split()[0])
    precision = torch.tensor([[12 / 0.25 + 1 / 225, 12 / 0.25], [12 / 0.25, 12 / 0.25 + 1 / 225]], dtype=F64)
    wider = (precision.diagonal() * torch.linalg.inv(precision).diagonal()).sqrt()  # of the two alone
    assert times == pytest.approx(2**0.5 * float(wider[0]), rel=0.05)
    started(never_apart, say=said.append)
    assert 'neither the data nor the priors tell "' in said[2]
    started(regression, say=said.append)
    assert len(said) == 3


def test_a_search_that_meets_no_number_goes_on_without_a_mode():
    """The log of 1.5 - w, at a mode that lies close to where it has none."""

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=F64), 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((1.5 - w).log(), 0.1), obs=y)

    said = []
    inference, (theta, preconditioner) = started(model, {"y": torch.full((50,), -3.0, dtype=F64)}, say=said.append)
    assert ["not finite" in sentence for sentence in said] == [True]
    assert inference.parameters.unflatten(theta)["guide.loc"].tolist() == [0.0]
    assert preconditioner.factor.tolist() == [[0.25]]
