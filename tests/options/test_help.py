"""`svi VERB --help` and words that are no verb."""

import pytest

from trainer.cli import VERBS, main
from trainer.options.config import config_folder
from trainer.options.help import text


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_every_option_of_a_verb_and_nothing_of_hydra(verb):
    said = text(config_folder(), verb, VERBS[verb].help)
    options = _options((config_folder() / f"{verb}.yaml").read_text())
    assert "debug: false" in options[-1] or verb == "train"
    assert all(line in said for line in options)
    assert "defaults:" not in said
    assert "hydra:" not in said


def _options(content):
    return content.partition("- _self_\n")[2].partition("\nhydra:")[0].strip().splitlines()


def test_help_shows_the_options_of_what_is_chosen(capsys):
    main(["train", "optimizer=sgd", "--help"])
    said = capsys.readouterr().out
    assert "momentum: 0.9" in said
    assert "beta2: null" not in said
    assert "optimizer: adam, adamw, clipped_adam, sgd" in said


@pytest.mark.parametrize(
    ("word", "said"), [("trian", " (do you mean train?)"), ("x", ""), ("best", " (it is svi runs DIR best=true now)")]
)
def test_a_word_that_is_no_verb_is_one_sentence(word, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([word, "data.path=x"])
    assert capsys.readouterr().err == f"svi: {word} is not a verb{said}: svi --help lists them.\n"
