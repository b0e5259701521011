"""What a config's classes are given is what they take."""

import pytest
from app_tools import config

from trainer.errors import UserError
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


def test_what_it_takes_is_bound():
    assert build.model(config("train", "data.path=x", "model=linear", "model.weight_sd=3").model).weight_sd == 3
    assert build.optimizer(config("train", "data.path=x", "optimizer=sgd", "optimizer.lr=0.3").optimizer).lr == 0.3
