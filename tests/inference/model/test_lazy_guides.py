"""A run is a function of data, model and seed: guides that were given as objects start anew, and stay as they were.

Also functions that make a guide, and the names that guide and model have to share.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal, AutoNormalMessenger, init_to_sample
from svi_problems import F64, batch_of, noise_of, one_group

from trainer.errors import UserError
from trainer.inference.objectives.elbo import ELBO
from trainer.inference.setup import guide_factory, set_up

GENERATOR = torch.Generator().manual_seed(0)
DATA = {"x": torch.randn(12, 2, generator=GENERATOR, dtype=F64), "y": torch.randn(12, generator=GENERATOR, dtype=F64)}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def hierarchy(x, y=None):
    s = pyro.sample("s", dist.LogNormal(torch.zeros(()), 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, s), obs=y)


PART = poutine.block(hierarchy, hide=["s"])


def of_s():
    loc = pyro.param("loc", lambda: torch.randn(()))  # what comes after a random start starts at random too
    return pyro.sample("s", dist.LogNormal(loc, 0.1))


def in_a_closure(kind):
    auto = kind(PART, init_loc_fn=init_to_sample)

    def guide(x, y=None):
        auto(x, y)
        of_s()

    return guide, auto


def in_a_list():
    parts = AutoGuideList(hierarchy)
    parts.append(AutoNormal(PART, init_loc_fn=init_to_sample))
    parts.append(lambda x, y=None: {"s": of_s()})
    return parts, parts[0]


def in_a_module():
    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.auto = AutoNormal(PART, init_loc_fn=init_to_sample)

        def forward(self, x, y=None):
            self.auto(x, y)
            of_s()

    guide = Guide()
    return guide, guide.auto


def easy():
    class Easy(EasyGuide):
        def guide(self, x, y=None):
            self.map_estimate("s")
            group = self.group(match="w")
            loc = pyro.param("loc", lambda: torch.randn(group.event_shape))
            group.sample("ws", dist.Normal(loc, 0.1).to_event(1))

    guide = Easy(hierarchy)
    return guide, guide


def alone():
    guide = AutoNormal(hierarchy, init_loc_fn=init_to_sample)
    return guide, guide


OBJECTS = {
    "alone": alone,
    "in a closure": lambda: in_a_closure(AutoNormal),
    "a messenger in a closure": lambda: in_a_closure(AutoNormalMessenger),
    "in a list": in_a_list,
    "in a module": in_a_module,
    "EasyGuide": easy,
}


def made(guide, seed=0, data=DATA, model=hierarchy):
    rows = batch_of(**data)
    return set_up(model, guide_factory(guide, data), rows, rows.size, ELBO(antithetic=False), seed=seed)


def elbo(inference, theta):
    elements = torch.ones(1, 1, inference.guide.noise_size[0])
    return inference.terms(theta, noise_of(elements), one_group(**DATA), 1.0)


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_run_knows_nothing_of_the_runs_before(kind):
    guide, auto = OBJECTS[kind]()
    before = {name: dict(each) if isinstance(each, dict) else each for name, each in vars(auto).items()}
    first, theta = made(guide)
    value = elbo(first, theta)
    narrow = {"x": DATA["x"][:, :1], "y": DATA["y"]}
    assert made(guide, data=narrow)[1].shape != theta.shape  # w has one element
    assert torch.equal(made(guide, seed=1)[1], made(OBJECTS[kind]()[0], seed=1)[1])
    again, other = made(guide)
    assert torch.equal(other, theta)
    assert torch.equal(elbo(again, other), value)
    assert torch.equal(elbo(first, theta), value)  # two posteriors of one object
    assert vars(auto) == before
    assert not list(pyro.get_param_store())


def test_what_an_object_has_learned_elsewhere_is_its_start():
    auto = AutoNormal(hierarchy)
    auto(**DATA)
    pyro.clear_param_store()
    auto.locs.w_unconstrained = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    inference, theta = made(lambda x, y=None: auto(x, y))
    found = inference.parameters.unflatten(theta)["AutoNormal.locs.w_unconstrained"]
    assert found.tolist() == [3.0, -1.0]


@pytest.mark.parametrize("kind", [AutoNormal, AutoDelta, AutoNormalMessenger])
def test_a_function_that_makes_a_guide_of_the_model(kind):
    assert torch.equal(made(lambda m: kind(m))[1], made(kind)[1])
    assert made(lambda m: kind(m))[0].guide.kind == made(kind)[0].guide.kind


def test_a_function_that_makes_a_guide_of_the_users():
    inference, _ = made(lambda m: in_a_closure(AutoNormal)[0])
    assert {"loc", "AutoNormal.locs.w_unconstrained"} < set(inference.parameters.shapes)


def test_a_guides_argument_that_is_no_column_is_named():
    def guide(rows):
        pyro.sample("s", dist.LogNormal(torch.zeros(len(rows)), 1.0))

    with pytest.raises(UserError, match=r'the guide needs an argument "rows".*guide.rows=.*return a guide'):
        made(guide)


def named(s="s", w="w", more=None, **infer):
    def guide(x, y=None):
        pyro.sample(s, dist.LogNormal(pyro.param("loc", torch.tensor(0.0)), 0.1))
        if w:
            pyro.sample(w, dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if more:
            pyro.sample(more, dist.Normal(torch.zeros(()), 1.0), infer=infer)

    return guide


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"w": "ww"}, r'guide samples "ww", which the model does not have \(do you mean w\?\)'),
        ({"s": "scale"}, r'"scale", which the model does not have \(do you mean s\?\)'),
        ({"more": "u"}, r'"u", which the model does not have \(leave it out\).*is_auxiliary'),
        ({"more": "y"}, r'guide samples "y", which is not a latent of the model.*leave it out'),
        ({"w": None}, r'latent site "w" of the model is missing from the guide'),
    ],
)
def test_names_that_guide_and_model_do_not_share(names, words):
    with pytest.raises(UserError, match=words):
        made(named(**names))


def test_an_auxiliary_site_is_the_guides_own():
    inference, theta = made(named(more="u", is_auxiliary=True))
    assert torch.isfinite(elbo(inference, theta)).all()
