"""The density of the unconstrained vector against autograd: log p(z) + log |det dz/du| for every support, and for
supports that depend on other latents."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from svi_problems import F64, batch_of, build, trace_at
from torch.distributions.transforms import AffineTransform, SoftplusTransform

from trainer.inference.model.latents import log_prob


def one(prior):
    return lambda x: pyro.sample("z", prior())


def t(*values):
    return torch.tensor(values, dtype=F64)


def dependent(x):
    a = pyro.sample("a", dist.Uniform(x.new_zeros(()), 1.0))
    pyro.sample("b", dist.Uniform(x.new_zeros(()), 1 - a))


def hierarchy(x):
    scale = pyro.sample("scale", dist.HalfNormal(x.new_tensor(2.0)))
    with pyro.plate("groups", 3):
        mean = pyro.sample("mean", dist.Normal(scale, scale))
        pyro.sample("power", dist.LogNormal(mean, 0.5))
        pyro.sample("parts", dist.Dirichlet(x.new_ones(4) * 2))


def improper(constraint, batch=(), event=()):
    return dist.ImproperUniform(constraint, batch, event)


# model, scalars of u
TABLE = {
    "normal": (one(lambda: dist.Normal(t(1.0, 2.0), 0.5).to_event(1)), 2),
    "multivariate normal": (one(lambda: dist.MultivariateNormal(t(0.0, 1.0), torch.eye(2, dtype=F64) + 0.5)), 2),
    "student t": (one(lambda: dist.StudentT(t(4.0), 0.0, 2.0).to_event(1)), 1),
    "lognormal": (one(lambda: dist.LogNormal(t(0.3, 0.1), 0.5).to_event(1)), 2),
    "half-Cauchy": (one(lambda: dist.HalfCauchy(t(2.0)).expand([3]).to_event(1)), 3),
    "gamma": (one(lambda: dist.Gamma(t(2.0, 3.0), 1.5)), 2),
    "beta": (one(lambda: dist.Beta(t(2.0), 3.0)), 1),
    "uniform": (one(lambda: dist.Uniform(t(2.0), 5.0)), 1),
    "truncated below": (one(lambda: dist.Pareto(t(1.5), 3.0)), 1),
    "softplus": (one(lambda: dist.TransformedDistribution(dist.Normal(t(0.5), 1.0), SoftplusTransform())), 1),
    "simplex": (one(lambda: dist.Dirichlet(t(2.0, 3.0, 4.0))), 2),
    "simplices": (one(lambda: dist.Dirichlet(t(2.0, 3.0, 4.0)).expand([2]).to_event(1)), 4),
    "ordered": (one(lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1), [dist.transforms.OrderedTransform()])), 3),
    "LKJ": (one(lambda: dist.LKJCholesky(4, t(1.5)[0])), 6),
    "improper": (one(lambda: improper(constraints.real, (2,))), 2),
    "improper, positive": (one(lambda: improper(constraints.positive, (), (3,))), 3),
    "improper, ordered": (one(lambda: improper(constraints.ordered_vector, (), (3,))), 3),
    "support of another latent": (dependent, 2),
    "hierarchy": (hierarchy, 1 + 3 + 3 + 9),
}  # fmt: skip


def free_coordinates(site) -> torch.Tensor:
    """As many of z's entries as u has, which determine the rest."""
    support, z = site["fn"].support, site["value"]
    base = getattr(support, "base_constraint", support)
    if base is constraints.simplex:
        return z[..., :-1].flatten()
    if base is constraints.corr_cholesky:
        return z[..., *torch.tril_indices(z.shape[-1], z.shape[-1], -1)].flatten()
    return z.flatten()


def with_data(model):
    def full(x):
        model(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)

    return full


@pytest.mark.parametrize("name", TABLE)
def test_density_of_u_matches_autograds_jacobian(name):
    model, size = TABLE[name]
    x = torch.zeros(2, dtype=F64)
    inference, theta = build(with_data(model), x=x)
    assert theta.shape == (2 * size,)
    assert not theta[:size].any()  # starts at u = 0
    u = torch.randn(size, dtype=F64, generator=torch.Generator().manual_seed(4))

    def draw(loc):
        return trace_at(inference, torch.cat([loc, theta[size:]]), torch.zeros(size, dtype=F64), batch_of(x=x))

    at = draw(u)
    sites = [at.trace.nodes[name] for name in at.log_prior]
    for site in sites:
        assert site["fn"].support.check(site["value"]).all()
    jacobian = torch.autograd.functional.jacobian(
        lambda loc: torch.cat([free_coordinates(draw(loc).trace.nodes[site["name"]]) for site in sites]), u
    )
    expected = sum(site["fn"].log_prob(site["value"]).sum() for site in sites) + jacobian.slogdet().logabsdet
    torch.testing.assert_close(sum(at.log_prior.values()), expected, rtol=1e-10, atol=1e-10)


ETA = torch.linspace(-1, 1, 6, dtype=F64)
WHOLE = torch.tensor([0, 1, 1, 0, 1, 1])
TABLE_OF = torch.tensor([-0.5, -1.5], dtype=F64)


class Looked(dist.TorchDistribution):
    """A user's own, which indexes with its value."""

    arg_constraints, support, batch_shape = {}, constraints.nonnegative_integer, torch.Size([6])

    def __init__(self):
        super().__init__(batch_shape=(6,), validate_args=False)

    def log_prob(self, value):
        return TABLE_OF[value]


LIKELIHOODS = {
    "Bernoulli by logits": lambda: dist.Bernoulli(logits=ETA),
    "Bernoulli by chances": lambda: dist.Bernoulli(ETA.sigmoid()),
    "relaxed over two": lambda: dist.ContinuousBernoulli(logits=ETA),
    "Binomial": lambda: dist.Binomial(3, logits=ETA),
    "beta-binomial": lambda: dist.BetaBinomial(ETA.exp(), 1 + 0 * ETA, 3),
    "Geometric": lambda: dist.Geometric(logits=ETA),
    "Poisson": lambda: dist.Poisson(ETA.exp()),
    "negative binomial": lambda: dist.NegativeBinomial(3.0, logits=ETA),
    "zero-inflated Poisson": lambda: dist.ZeroInflatedPoisson(ETA.exp(), gate=ETA.sigmoid()),
    "zero-inflated Bernoulli": lambda: dist.ZeroInflatedDistribution(dist.Bernoulli(logits=ETA), gate=ETA.sigmoid()),
    "Normal": lambda: dist.Normal(ETA, 1.0),
    "independent": lambda: dist.Bernoulli(logits=ETA).to_event(1),
    "masked": lambda: dist.Bernoulli(logits=ETA).mask(WHOLE > 0),
    "expanded": lambda: dist.Bernoulli(logits=ETA[0]).expand([6]),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.zeros(6, 2, dtype=F64)), dist.Bernoulli(logits=torch.stack([ETA, -ETA], -1))
    ),
    "transformed": lambda: dist.TransformedDistribution(dist.Normal(ETA, 1.0), AffineTransform(1.0, 2.0)),
    "Categorical": lambda: dist.Categorical(logits=torch.stack([ETA, -ETA], -1)),
    "ordered": lambda: dist.OrderedLogistic(ETA, torch.tensor([-0.3, 0.4], dtype=F64)),
    "Multinomial": lambda: dist.Multinomial(int(WHOLE.sum()), logits=ETA),
    "one of many": lambda: dist.OneHotCategorical(logits=torch.stack([ETA, -ETA], -1)),
}


@pytest.fixture
def in_float64():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_whole_numbers_and_truth_values_have_the_density_of_the_same_floats(kind, in_float64):
    value = torch.stack([WHOLE, 1 - WHOLE], -1) if kind == "one of many" else WHOLE

    def density(value):
        def model():
            with pyro.validation_enabled(True):
                pyro.sample("y", LIKELIHOODS[kind](), obs=value)

        return log_prob(poutine.trace(model).get_trace().nodes["y"])

    wanted = density(value.double())
    assert torch.isfinite(wanted).all()
    torch.testing.assert_close(density(value), wanted, rtol=1e-15, atol=0)
    torch.testing.assert_close(density(value.bool()), wanted, rtol=1e-15, atol=0)


def test_a_distribution_that_indexes_keeps_its_integers():
    node = poutine.trace(lambda: pyro.sample("y", Looked(), obs=WHOLE)).get_trace().nodes["y"]
    assert torch.equal(log_prob(node), TABLE_OF[WHOLE])


def test_what_is_wrong_with_integers_is_said_as_with_floats():
    node = poutine.trace(lambda: pyro.sample("y", dist.Normal(ETA[:4], 1.0), obs=WHOLE)).get_trace().nodes["y"]
    with pytest.raises(RuntimeError, match="size"):
        log_prob(node)
