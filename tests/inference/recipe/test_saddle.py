"""Starts at saddles: symmetric models leave them for an optimum known in closed form, others stay to the bit."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from svi_problems import F64, build, one_group, regression, regression_data

from trainer.inference.recipe import saddle
from trainer.inference.recipe.laplace import laplace_start
from trainer.inference.recipe.off_saddle import falls_at, left, off_saddle, sampled, start_of

G = torch.Generator().manual_seed(3)
X = torch.randn(80, dtype=F64, generator=G)
Y = 1.5 * X + torch.randn(80, dtype=F64, generator=G)
SXX, SXY = float(X @ X), float(X @ Y)
LEFT = "saddle"


def normal(x, name, size=None, sd=1.0):
    shape = () if size is None else (size,)
    return pyro.sample(name, dist.Normal(x.new_zeros(shape), sd).to_event(len(shape)))


def product(x, y):
    a, b = normal(x, "a"), normal(x, "b")
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a * b * x, 1.0), obs=y)


def square(x, y):
    w = normal(x, "w")
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w**2 * x, 1.0), obs=y)


def triple(x, y):
    w = normal(x, "w", 3)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w.prod() * x, 1.0), obs=y)


def mixture(y):
    """Means at random, alike at 0: the gradient is the same for both."""
    m = normal(y, "m", 2, 5.0)
    with pyro.plate("data", len(y)):
        parts = dist.Normal(m, 1.0)
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(y.new_ones(2) / 2), parts), obs=y)


def bilinear(row, column, y, rows=7, columns=5):
    u, v = normal(y, "u", rows), normal(y, "v", columns)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(u[row] * v[column], 1.0), obs=y)


def network(x, y):
    w, v = normal(x, "w", 1, 2.0), normal(x, "v", 1, 2.0)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((torch.tanh(x[:, None] * w) * v).sum(1), 0.5), obs=y)


def matrix(rows, columns, noise=1.0, seed=5):
    """A matrix of rank one with noise, as entries, and itself."""
    g = torch.Generator().manual_seed(seed)
    u, v = torch.randn(rows, dtype=F64, generator=g), torch.randn(columns, dtype=F64, generator=g)
    y = 2 * u[:, None] * v + noise * torch.randn(rows, columns, dtype=F64, generator=g)
    row, column = (each.flatten() for each in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    return {"row": row, "column": column, "y": y.flatten()}, y


def started(model, seed=0, **data):
    """theta's locations at the start, the coordinates, and what was said."""
    inference, theta = build(model, **data)
    said: list[str] = []
    made, preconditioner = start_of(inference, theta, one_group(**data), seed, said.append)
    return inference, made, preconditioner, said


def locations(inference, theta):
    return inference.parameters.unflatten(theta)["guide.loc"]


def test_lanczos_finds_what_a_dense_solver_finds():
    a = torch.randn(20, 20, dtype=F64, generator=G)
    a = a + a.T
    values, vectors = saddle.lowest(lambda v: a @ v, torch.randn(20, dtype=F64, generator=G))
    torch.testing.assert_close(values, torch.linalg.eigvalsh(a), rtol=0, atol=1e-10)
    torch.testing.assert_close((vectors @ a @ vectors.T).diagonal(), values, rtol=0, atol=1e-10)


def test_lanczos_ends_where_a_space_is_closed():
    start = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=F64)
    values, vectors = saddle.lowest(lambda v: torch.tensor([-1.0, 2.0, 3.0, 4.0], dtype=F64) * v, start)
    assert values.tolist() == pytest.approx([-1.0, 3.0])
    assert vectors[:, [1, 3]].abs().max() == 0


@pytest.mark.parametrize(("coupling", "slope", "count"), [(2.0, 0.0, 1), (0.5, 0.0, 0), (2.0, 1.0, 0)])
def test_a_saddle_curves_downwards_and_does_not_slope(coupling, slope, count):
    """(a^2 + b^2) / 2 - c a b falls along a = b for c > 1; where it slopes there it is no saddle."""
    curvature = torch.tensor([[1.0, -coupling], [-coupling, 1.0]], dtype=F64)
    found = saddle.falling(torch.full((2,), slope, dtype=F64), curvature)
    assert len(found) == count
    for along in found:
        assert float(along[0]) == pytest.approx(float(along[1]))


def test_latents_that_do_not_move_are_found_and_unused_ones_are_not():
    """Of w0 w1 w2 + 0 w3 + w4 the first three neither slope nor curve at 0, and matter elsewhere."""

    def likelihood(at):
        return ((at[0] * at[1] * at[2] + at[4] - 2.0) ** 2).sum() + 0.0 * at[3]

    assert saddle.hidden(likelihood, torch.zeros(5, dtype=F64), 0).tolist() == [True, True, True, False, False]


def of_product():
    p = (SXY - 1) / SXX
    return lambda at: (at.abs() - p**0.5).abs().max() + (at[0] - at[1]).abs() if at.prod() > 0 else 1.0


def of_square():
    return lambda at: (at.abs() - ((SXY - 0.5) / SXX) ** 0.5).abs().max()


def of_triple():
    """By p = w^3 the slope of 3 |p|^(2/3) / 2 is |p|^(-1/3): the larger root."""
    low, high = 0.5, 3.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if middle ** (-1 / 3) - SXY + middle * SXX < 0 else (low, middle)
    return lambda at: (at.abs() - low ** (1 / 3)).abs().max() if at.prod() > 0 else 1.0


DATA = {"x": X, "y": Y}
PRODUCTS = [(product, of_product), (square, of_square), (triple, of_triple)]


@pytest.mark.parametrize(("model", "answer"), PRODUCTS, ids=["product", "square", "triple"])
@pytest.mark.parametrize("seed", range(3))
def test_a_product_starts_at_one_of_its_modes(model, answer, seed):
    inference, theta, preconditioner, said = started(model, seed, **DATA)
    assert float(answer()(locations(inference, theta))) < 1e-6
    assert preconditioner is not None
    assert any(LEFT in sentence for sentence in said)


def test_seeds_name_the_mode():
    """Both signs come, each seed's always the same."""
    signs = [float(locations(*started(square, seed, **DATA)[:2]).sign()) for seed in range(8)]
    assert set(signs) == {-1.0, 1.0}
    assert signs == [float(locations(*started(square, seed, **DATA)[:2]).sign()) for seed in range(8)]


def test_a_bilinear_model_starts_at_the_soft_thresholded_singular_value():
    """Srebro and Jaakkola 2003: under standard normal priors the mode of u v' is (s1 - 1) times the singular pair."""
    data, y = matrix(7, 5)
    inference, theta, _, said = started(bilinear, **data)
    u, v = locations(inference, theta).split([7, 5])
    left_, values, right = torch.linalg.svd(y)
    torch.testing.assert_close(u[:, None] * v, (values[0] - 1) * left_[:, :1] * right[:1], rtol=0, atol=1e-5)
    assert any(LEFT in sentence for sentence in said)


def test_equal_components_part():
    """The means end where each is that of its part of the rows, weighed by the prior: EM's fixed point."""
    g = torch.Generator().manual_seed(0)
    y = torch.cat([torch.randn(40, dtype=F64, generator=g) - 2, torch.randn(60, dtype=F64, generator=g) + 2])
    inference, theta, preconditioner, said = started(mixture, y=y)
    m = locations(inference, theta)
    parts = torch.softmax(-0.5 * (y[:, None] - m) ** 2, 1)
    torch.testing.assert_close(m, (parts * y[:, None]).sum(0) / (parts.sum(0) + 1 / 25), rtol=0, atol=1e-5)
    assert (m[0] - m[1]).abs() > 3
    assert preconditioner is not None
    assert any(LEFT in sentence for sentence in said)


def test_a_network_starts_at_the_lowest_place_of_a_lattice():
    y = torch.tanh(1.3 * X) * 2 + 0.5 * Y.sub(1.5 * X)
    inference, theta, _, said = started(network, x=X, y=y)
    w, v = locations(inference, theta)

    def loss(w, v):
        return 2 * ((y - torch.tanh(X * w) * v) ** 2).sum() + (w**2 + v**2) / 8

    grid = [(a, b) for a in torch.linspace(0.2, 4, 40, dtype=F64) for b in torch.linspace(0.2, 4, 40, dtype=F64)]
    assert float(loss(w, v)) <= min(float(loss(a, b)) for a, b in grid)
    assert any(LEFT in sentence for sentence in said)


def test_a_mode_stays_to_the_bit(monkeypatch):
    """A regression, and a product of which the data say so little that 0 is its mode."""
    weak = {"x": 0.5 / SXY * X, "y": Y}
    problems = ((regression, regression_data(orthogonal=False)), (product, weak))
    found = [started(model, **data) for model, data in problems]
    monkeypatch.setattr("trainer.inference.recipe.laplace.off_saddle", lambda losses, found, *others: found)
    for (model, data), (_, theta, preconditioner, said) in zip(problems, found, strict=True):
        inference, start = build(model, **data)
        want, others = laplace_start(inference, start, one_group(**data), lambda sentence: None)
        assert torch.equal(theta, want)
        assert torch.equal(preconditioner.factor, others.factor)
        assert not any(LEFT in sentence for sentence in said)
    assert locations(found[1][0], found[1][1]).tolist() == [0.0, 0.0]


LARGE = {"rows": 160, "columns": 110}


def large(row, column, y):
    return bilinear(row, column, y, **LARGE)


def with_intercept(row, column, y):
    """A parameter beside the guide."""
    bias = pyro.param("bias", y.new_zeros(()))
    u, v = normal(y, "u", 30), normal(y, "v", 20)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(bias + u[row] * v[column], 1.0), obs=y)


@pytest.mark.parametrize(("model", "sizes"), [(large, tuple(LARGE.values())), (with_intercept, (30, 20))])
def test_without_a_mode_to_start_at_a_saddle_is_left_too(model, sizes):
    """More than 256 latents, another parameter: to the rank-one part of the matrix."""
    data, y = matrix(*sizes, seed=1)
    inference, theta, preconditioner, said = started(model, **data)
    u, v = locations(inference, theta).split(sizes)
    left_, values, right = torch.linalg.svd(y)
    off = (u[:, None] * v - values[0] * left_[:, :1] * right[:1]).norm() / values[0]
    assert float(off) < 0.15
    assert preconditioner is None
    assert any(LEFT in sentence for sentence in said)


def groups(group, y):
    """A hierarchy of more than 256 latents, of which some have no row, and one whose mean is 0 to rounding."""
    mean, log_sd = normal(y, "mean"), normal(y, "log_sd")
    z = normal(y, "z", 300)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean + log_sd.exp() * z[group], 1.0), obs=y)


def test_a_large_model_that_is_at_no_saddle_stays_to_the_bit():
    g = torch.Generator().manual_seed(2)
    group = torch.randint(0, 200, (500,), generator=g)
    y = torch.randn(200, dtype=F64, generator=g)[group] + torch.randn(500, dtype=F64, generator=g)
    data = {"group": group, "y": y - y.mean()}
    inference, theta = build(groups, **data)
    assert off_saddle(inference, theta, one_group(**data), 0, print) is theta


def guide_at(inference, loc, sd):
    theta = torch.zeros(inference.parameters.size, dtype=F64)
    view = inference.gaussian
    theta[view.loc], theta[view.covariance.log_sd] = torch.as_tensor(loc, dtype=F64), torch.tensor(sd, dtype=F64).log()
    return theta


def test_the_elbo_curves_downwards_at_a_saddle_and_not_at_an_optimum():
    """At 0 the mean curvature of a b has -(Sxy) beside 1 + s^2 Sxx: negative for small scales, positive for large."""
    inference, _ = build(product, **DATA)
    rows = one_group(**DATA)
    found = falls_at(inference, guide_at(inference, [0.0, 0.0], 0.3), rows, 0)
    assert len(found) == 1
    assert float(found[0, 0]) == pytest.approx(float(found[0, 1]), rel=0.2)
    assert not len(falls_at(inference, guide_at(inference, [0.0, 0.0], 1.5), rows, 0))
    p = ((SXY - 1) / SXX) ** 0.5
    assert not len(falls_at(inference, guide_at(inference, [p, p], 0.08), rows, 0))
    moved, best = left(inference, guide_at(inference, [0.0, 0.0], 0.3), rows, found, 0)
    assert best is not None
    assert float(locations(inference, moved).prod()) > 1


def test_products_tell_of_a_saddle_beyond_256_latents():
    data, _ = matrix(*LARGE.values(), seed=1)
    inference, theta = build(large, **data)
    rows = one_group(**data)
    found = falls_at(inference, theta, rows, 0)
    assert len(found)
    problem = sampled(inference, theta, rows)
    assert problem is not None
    for along in found:
        assert float(along @ saddle.product_at(problem.elbo(9, 8), problem.at)(along)) < 0
    moved, best = left(inference, theta, rows, found, 0)
    assert best is not None
    view = inference.gaussian
    fitted = moved.clone()
    fitted[view.covariance.log_sd] = -2.5
    assert not len(falls_at(inference, fitted, rows, 0))


def test_the_best_of_several_optima_goes_on():
    """A double well with a bump: pushes end in both wells, and the log has their gap."""

    def loss(at):
        return (at[0] ** 2 - 1) ** 2 - 0.5 * at[0] ** 3

    at = torch.zeros(1, dtype=F64)
    none = torch.zeros(1, dtype=torch.bool)
    search = saddle.Search(lambda x: saddle.descended(loss, x), lambda x: -float(loss(x)), torch.ones(1, 1) > 0)
    directions = torch.ones(1, 1, dtype=F64)
    sides = iter([-0.5, 0.5, -0.5, 0.5])
    best = saddle.best_of(search, at, directions, none, lambda number: at + next(sides), -1.0)
    assert best is not None
    assert float(best.at) > 0
    low, high = (-float(loss(saddle.descended(loss, at + side))) for side in (-0.5, 0.5))
    assert best.values == pytest.approx((high, high, low, low))
    assert f"2 optima, up to {high - low:.3g} nats apart" in best.sentence()


def test_pushes_that_do_not_settle_are_given_up():
    """After two, and with nothing said of a ridge along which the curvature is negative."""
    at, tried = torch.zeros(1, dtype=F64), []
    search = saddle.Search(lambda start: tried.append(start), lambda end: 0.0, torch.ones(1, 1) > 0)
    none = torch.zeros(1, dtype=torch.bool)
    assert saddle.best_of(search, at, torch.ones(1, 1, dtype=F64), none, lambda number: at + number, -1.0) is None
    assert len(tried) == 2
