"""What a config's classes are given is what they take."""

import app_models
import pytest
import torch
from app_tools import config
from omegaconf import OmegaConf

from trainer.errors import UserError
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.model.plates import Batch, PlatedModel
from trainer.models.linear import LinearRegression
from trainer.options import build


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("model._target_=app_models.dying", "model.numbr=3"),
            "option model.numbr is unknown to app_models.dying (do you mean number?)",
        ),
        (
            ("model._target_=app_models.linear", "model.players=3"),
            "option model.players is unknown to app_models.linear (it takes x, y)",
        ),
        (("model=linear", "model.weigth_sd=3"), "(do you mean weight_sd?)"),
    ],
)
def test_an_option_that_a_model_does_not_take(words, sentence):
    """A function too, which would be called with it much later."""
    with pytest.raises(UserError) as refused:
        build.model(config("train", "data.path=x", *words).model)
    assert sentence in str(refused.value)


def test_a_function_is_called_without_a_detour():
    """With its options where it has some; a step calls it many times."""
    plain = build.model(config("train", "data.path=x", "model._target_=app_models.linear").model)
    assert plain is app_models.linear
    bound = build.model(config("train", "data.path=x", "model._target_=app_models.dying", "model.at=3").model)
    assert bound.func is app_models.dying
    assert bound.keywords["at"] == 3


class Narrow(MeanField):
    """A family of guides that no file of conf/ names."""

    kind = "narrow"

    def __init__(self, model, batch, width: float = 0.1):
        super().__init__(model, batch, width)


@pytest.mark.parametrize(
    ("target", "options", "kind"),
    [
        ("trainer.inference.guides.mean_field.MeanField", {"init_scale": 0.3}, "mean-field"),
        (f"{__name__}.Narrow", {"width": 0.3}, "narrow"),
    ],
)
def test_a_family_of_guides_is_made_of_the_model(target, options, kind):
    plated, x = PlatedModel(LinearRegression(noise_sd=1.0), ("x", "y"), "data"), torch.ones(4, 2)
    factory = build.guide(OmegaConf.create({"_target_": target, **options}), plated.fn, ("x", "y"), "data")
    guide = factory(plated, Batch.whole({"x": x, "y": x[:, 0]}))
    assert (guide.kind, guide.init_scale) == (kind, 0.3)


class WithNodes(MeanField):
    """A family with an option that guides have of the latents of rows."""

    def __init__(self, model, batch, nodes: int = 7):
        super().__init__(model, batch)
        self.nodes = nodes


@pytest.mark.parametrize(("words", "own"), [((), 7), (("guide.nodes=5",), 5)])
def test_options_of_latents_of_rows_stand_beside_those_of_any_guide(words, own):
    plated, x = PlatedModel(LinearRegression(noise_sd=1.0), ("x", "y"), "data"), torch.ones(4, 2)
    rows = Batch.whole({"x": x, "y": x[:, 0]})
    for target in ("pyro.infer.autoguide.AutoNormal", f"{__name__}.WithNodes"):
        node = config("train", "data.path=x", f"guide._target_={target}", *words).guide
        guide = build.guide(node, plated.fn, ("x", "y"), "data")(plated, rows)
        assert build.rows(node).nodes == (own if words else None)
    assert guide.nodes == own


def test_what_it_takes_is_bound():
    assert build.model(config("train", "data.path=x", "model=linear", "model.weight_sd=3").model).weight_sd == 3
    assert build.optimizer(config("train", "data.path=x", "optimizer=sgd", "optimizer.lr=0.3").optimizer).lr == 0.3
