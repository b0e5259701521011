"""The data plate: what it refuses, by name, and what it makes of a batch."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from svi_problems import F64, batch_of

from trainer.errors import UserError
from trainer.inference.model.arguments import arguments
from trainer.inference.model.latents import log_prob, total_log_prob
from trainer.inference.model.plates import PlatedModel

N = 1000


def likelihood(model, batch, plate="data"):
    with pyro.validation_enabled(True):
        trace = poutine.trace(PlatedModel(model, batch.columns, plate)).get_trace(batch)
    return float(total_log_prob(trace.nodes["y"]).detach())


X = torch.tensor([0.3, -1.2, 2.0, 0.3], dtype=F64)  # a padded batch: three rows and one repeated
PADDED = batch_of(valid=3, num_obs=N, x=X)
TRUE = N / 3 * sum(-0.5 * (v - 0.5) ** 2 - 0.5 * math.log(2 * math.pi) for v in (0.3, -1.2, 2.0))


def plated(make_plate, scale=1.0):
    def model(x):
        with poutine.scale(scale=scale), make_plate(x):
            pyro.sample("y", dist.Normal(0.5, 1.0), obs=x)

    return model


@pytest.mark.parametrize(
    "make_plate",
    [
        lambda x: pyro.plate("data", len(x)),
        lambda x: pyro.plate("data", x.shape[0], dim=-1),
        lambda x: pyro.plate("data", N, subsample_size=len(x)),
        lambda x: pyro.plate("data", 10**12, subsample_size=len(x)),
        lambda x: pyro.plate("data", 7 * len(x), subsample_size=len(x)),
    ],
    ids=["len", "dim", "N", "wrong N", "another N"],
)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_any_declared_size_gives_n_over_b_times_the_users_scale(make_plate, scale):
    assert likelihood(plated(make_plate, scale), PADDED) == pytest.approx(scale * TRUE, rel=1e-12)


def test_the_users_mask_and_padding_are_both_kept():
    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            pyro.sample("y", dist.Normal(0.5, 1.0), obs=x)

    expected = N / 3 * sum(-0.5 * (v - 0.5) ** 2 - 0.5 * math.log(2 * math.pi) for v in (0.3, 2.0))
    assert likelihood(model, PADDED) == pytest.approx(expected, rel=1e-12)


def test_a_vector_scale_of_the_users_weighs_its_own_rows():
    def model(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=F64)):
            pyro.sample("y", dist.Normal(0.5, 1.0), obs=x)

    weighed = sum(w * (-0.5 * (v - 0.5) ** 2 - 0.5 * math.log(2 * math.pi)) for w, v in ((1, 0.3), (2, -1.2), (4, 2.0)))
    assert likelihood(model, PADDED) == pytest.approx(N / 3 * weighed, rel=1e-12)


def test_the_plates_name_is_settable_and_other_plates_are_left_alone():
    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(0.5, 1.0), obs=x)

    assert likelihood(model, PADDED, plate="rows") == pytest.approx(TRUE, rel=1e-12)
    assert likelihood(model, PADDED, plate="data") == pytest.approx(
        sum(float(dist.Normal(0.5, 1.0).log_prob(v)) for v in X), rel=1e-6
    )


def test_the_plates_indices_number_the_batch():
    def model(x):
        with pyro.plate("data", len(x)) as rows:
            pyro.sample("y", dist.Normal(0.5, 1.0), obs=x[rows])

    assert likelihood(model, PADDED) == pytest.approx(TRUE, rel=1e-12)


TABLE = torch.arange(float(N))


def refused(x, kind):
    if kind == "subsample":
        plate = pyro.plate("data", N, subsample=torch.arange(len(x)))
    elif kind == "wrong size":
        plate = pyro.plate("data", N)
    elif kind == "series":
        plate = pyro.plate("data", 2)
    elif kind == "wrong subsample size":
        plate = pyro.plate("data", N, subsample_size=len(x) + 1)
    elif kind == "no size":
        plate = pyro.plate("data")
    elif kind == "loop":
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"y{i}", dist.Normal(0.5, 1.0), obs=x[i])
        return
    elif kind == "loop, N":
        for i in pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample(f"y{i}", dist.Normal(0.5, 1.0), obs=x[i])
        return
    else:
        plate = pyro.plate("data", N, subsample_size=len(x))
    with plate as rows:
        column = {"table": lambda: TABLE[rows], "column": lambda: x[rows], "take": lambda: TABLE.index_select(0, rows)}
        pyro.sample("y", dist.Normal(0.5, 1.0), obs=column.get(kind, lambda: x)())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("subsample", "drop subsample="),
        ("wrong size", 'plate\\("data"\\) takes 1000 rows where the batch has 4'),
        ("series", r"takes 2 rows where the batch has 4.*make each of them one row \(svi shard group_by=COLUMN\)"),
        ("wrong subsample size", "draws its own rows: write"),
        ("no size", 'has no size at site "y"'),
        ("loop", r'loop around site "y0": .*make the whole series one row \(svi shard group_by=COLUMN\)'),
        ("loop, N", "data plate's own indices"),
        ("table", "data plate's own indices"),
        ("column", "data plate's own indices"),
        ("take", "data plate's own indices"),
    ],
)
def test_refused(kind, words):
    with pytest.raises(UserError, match=words):
        likelihood(functools.partial(refused, kind=kind), PADDED)


class Bound:
    def model(self, x, z, y=None):
        pass


class Module(torch.nn.Module):
    def forward(self, x, y=None):
        pass


@pytest.mark.parametrize(
    ("fn", "taken"),
    [
        (lambda x: None, ("x",)),
        (lambda x, y=None, k=3: None, ("x", "y")),
        (lambda *, z, x: None, ("z", "x")),
        (lambda x, *rest: None, ("x",)),
        (lambda **columns: None, ("x", "y", "z")),
        (lambda y, **columns: None, ("y", "x", "z")),
        (Bound().model, ("x", "z", "y")),
        (Module(), ("x", "y")),
        (functools.partial(lambda x, players, y=None: None, players=3), ("x", "y")),
        (functools.partial(lambda players, x: None, 3), ("x",)),
        (poutine.scale(lambda x, y=None: None, scale=2.0), ("x", "y")),
    ],
    ids=[
        "plain",
        "default",
        "keyword",
        "star",
        "kwargs",
        "mixed",
        "bound",
        "module",
        "partial",
        "positional",
        "poutine",
    ],
)
def test_arguments_are_columns_by_name(fn, taken):
    assert arguments(fn, ["x", "y", "z"]) == taken


def test_an_argument_that_is_no_column_keeps_its_default():
    seen = {}

    def model(x, prior=2.5, **rest):
        seen.update(prior=prior, rest=sorted(rest))

    PlatedModel(model, ["x", "y"])(batch_of(x=X, y=X))
    assert seen == {"prior": 2.5, "rest": ["y"]}


def test_a_required_argument_that_is_no_column_is_named():
    with pytest.raises(UserError, match=r'an argument "age" that is not a column of the data \(x, y\)'):
        arguments(lambda x, age: None, ["x", "y"])


def test_one_parameter_per_row_is_refused_and_one_per_column_is_not():
    def model(x, per):
        with pyro.plate("data", len(x)):
            a = pyro.param("a", torch.zeros(len(x) if per == "row" else 3), event_dim=0 if per == "row" else 1)
            pyro.sample("y", dist.Normal(a.sum(), 1.0), obs=x)

    assert math.isfinite(likelihood(functools.partial(model, per="column"), PADDED))
    pyro.clear_param_store()
    with pytest.raises(UserError, match='param "a" has one value per row'):
        likelihood(functools.partial(model, per="row"), PADDED)


@pytest.mark.parametrize("dim", [-1, -2, -3])
def test_padding_is_masked_along_the_plates_own_dimension(dim):
    shape = (4,) + (1,) * (-dim - 1)

    def model(x):
        with pyro.plate("data", len(x), dim=dim):
            pyro.sample("y", dist.Normal(x.new_tensor(0.5), 1.0), obs=x.view(shape))

    batch = batch_of(valid=3, num_obs=N, x=X)
    trace = poutine.trace(PlatedModel(model, ["x"])).get_trace(batch)
    assert log_prob(trace.nodes["y"]).shape == shape
    assert float(total_log_prob(trace.nodes["y"])) == pytest.approx(TRUE, rel=1e-12)
