"""Every option of conf/, tried with what it may not be: one sentence that names it, its value and what it may be."""

import enum
import math
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
import torch
from app_tools import svi
from omegaconf import DictConfig, OmegaConf

from trainer import cli
from trainer.errors import UserError
from trainer.options import parts, verbs
from trainer.options.config import config_folder, node_of
from trainer.options.entrance import check, composed, of_call, options, resolved
from trainer.options.kinds import Part, part_of, words
from trainer.options.records import bound, kinds_of, plain

GIVEN = {
    "train": {"data.path": "x"},
    "predict": {"data.path": "x", "run": "r", "out": "o"},
    "latents": {"data.path": "x", "run": "r", "out": "o"},
    "export": {"run": "r", "out": "o"},
    "verify": {"data.path": "x"},
    "inspect": {"data.path": "x"},
}
OPEN = {"_target_", "_recursive_"}  # what Hydra makes, and how
WRONG: tuple[Any, ...] = (
    "bogus", "", True, None, 2.5, 0, -1, -0.5, 1.5, 10**30, math.nan, math.inf, [], [1, 2], [[1]], ["a"], {"a": 1}, {}
)  # fmt: skip


def given(verb: str) -> list[str]:
    return [f"{name}={value}" for name, value in GIVEN.get(verb, {}).items()]


def leaves(node: DictConfig, above: str = "") -> Iterator[str]:
    """The full names of what holds no other options; a part without any counts for itself."""
    for name in (str(name) for name in node if name not in OPEN):
        inner = node._get_node(name)
        if isinstance(inner, DictConfig) and not inner._is_none() and len(inner):
            yield from leaves(inner, f"{above}{name}.")
        else:
            yield f"{above}{name}"


@cache
def every_option() -> dict[tuple[str, str], tuple[str, ...]]:
    """(verb, option) -> the words that choose the part of which it is one: of all verbs and all files of groups."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for verb in cli.VERBS:
        for name in leaves(composed(verb, given(verb))):
            found[verb, name] = ()
    for path in sorted(config_folder().glob("*/*.yaml")):
        group, choice = path.parent.name, (f"{path.parent.name}={path.stem}",)
        node = node_of(path, group)
        cfg = composed("train", [*given("train"), *choice])
        inside = OmegaConf.select(cfg, node) if node else cfg
        for name in leaves(inside, f"{node}." if node else ""):
            found.setdefault(("train", name), choice)
    return found


def kind_of(verb: str, name: str, cfg: DictConfig) -> Any:
    """The kind of an option, by its name; None: it is of a part, or in one, that is open."""
    kinds, above, kind = kinds_of(verbs.VERBS[verb].record), "", None
    for word in name.split("."):
        kind = kinds.get(word)
        if kind is None:
            return None
        above = f"{above}.{word}" if above else word
        part = part_of(kind)
        inner = [each for each in (kind, *get_args(kind)) if hasattr(each, "__dataclass_fields__")]
        if part is not None:
            node = OmegaConf.select(cfg, above)
            if part.several:
                kinds = dict.fromkeys(node, Part)
                continue
            records = part.record, parts.RECORDS.get(str(node.get("_target_")) if node else "")
            kinds = {name: kind for each in records if each for name, kind in kinds_of(each).items()}
        elif inner:
            kinds = kinds_of(inner[0])
        elif get_origin(kind) is dict:
            return kind
    return kind


def fits(kind: Any, value: Any) -> bool:
    try:
        bound(kind, value, "x")
    except UserError:
        return False
    return True


def test_the_walk_meets_every_file():
    names = {name for _, name in every_option()}
    for path in config_folder().rglob("*.yaml"):
        keys = [key for key in (OmegaConf.load(path) or {}) if key not in ("defaults", "hydra", *OPEN)]
        group = path.parent.relative_to(config_folder()).as_posix()
        node = "" if group == "." else node_of(path, group)
        if "hydra" in path.parts or group.startswith("hydra") or group == "logger":
            continue
        for key in keys:
            full = f"{node}.{key}" if node else str(key)
            assert any(name == full or name.startswith(f"{full}.") for name in names), f"{path}: {key}"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_an_option_that_may_not_be_is_one_sentence(verb):
    """Each option of a verb, at its own kind's limits and at a list of values of every other type."""
    walked = [(name, choice) for (of, name), choice in every_option().items() if of == verb]
    configs = {choice: composed(verb, [*given(verb), *choice]) for _, choice in walked}
    for name, choice in walked:
        cfg = configs[choice]
        kind = kind_of(verb, name, cfg)
        assert kind is not None, f"{verb}: {name} has no kind: give its record in trainer/app/options one"
        if part_of(kind) is not None:  # a part without options
            continue
        wrong = [value for value in WRONG if not fits(kind, value)]
        assert wrong, f"{verb}: {name} may be anything"
        content: Any = OmegaConf.to_container(cfg, resolve=True)
        *path, last = name.split(".")
        for value in wrong:
            node = deepcopy(content)
            of_key = reduce(getitem, path, node)
            of_key[last] = value
            with pytest.raises(UserError) as refused:
                options(verb, OmegaConf.create(node))
            is_a_sentence(str(refused.value), name)


@pytest.mark.parametrize("path", sorted((config_folder() / "hydra").rglob("*.yaml")), ids=lambda path: path.stem)
def test_an_option_of_a_sweep_that_may_not_be_is_one_sentence(path):
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    content.pop("defaults", None)
    kinds = kinds_of(parts.RECORDS[content["_target_"]])
    for name in content.keys() - OPEN:
        if part_of(kinds[name]) is None:
            for value in [value for value in WRONG if not fits(kinds[name], value)]:
                with pytest.raises(UserError) as refused:
                    bound(Part, {**content, name: value}, "hydra.sweeper")
                is_a_sentence(str(refused.value), f"hydra.sweeper.{name}")
    bound(Part, content, "hydra.sweeper")


def is_a_sentence(said: str, name: str) -> None:
    """It begins with the option, says what it must be, and ends there."""
    assert re.match("(option )?" + re.escape(name) + r"(\.\w+)?[= ]", said), said
    assert re.fullmatch(r"[^\n]*\.", said), said
    assert re.search(" must | is unknown| is missing", said), said


def test_what_conf_says_is_what_a_record_takes():
    """Each default fits its kind, and each kind has words."""
    for verb in cli.VERBS:
        made = options(verb, composed(verb, given(verb)))
        assert plain(made).keys() == {str(name) for name in composed(verb, given(verb))}
        for kind in kinds_of(verbs.VERBS[verb].record).values():
            if not hasattr(kind, "__dataclass_fields__") and part_of(kind) is None:
                assert words(kind)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("start=bogus", "start=bogus must be laplace or zero."),
        ("objective.kl=foo", "objective.kl=foo must be analytic, monte_carlo or sticking_the_landing."),
        ("objective.kl_weight=2", "objective.kl_weight=2 must be a number from 0 to 1."),
        ("objective=renyi objective.alpha=2", "objective.alpha=2 must be a number from 0 to 1."),
        ("objective=iw objective.draws=0", "objective.draws=0 must be a whole number from 1 to 10,000."),
        ("objective.kl_warmup=0", "objective.kl_warmup=0 must be a whole number from 1 up."),
        ("optimizer.lr=-1", "optimizer.lr=-1 must be a number above 0, or null."),
        ("guide=arrow guide.rows=all", "guide.rows=all must be auto, integrate, amortise or mean_field."),
        ("guide.nodes=129", "guide.nodes=129 must be a whole number from 1 to 128, or null."),
        ("guide.widths=[]", "guide.widths=[] must be widths of layers, as [64,64], or null."),
        ("guide.row_draws=0", "guide.row_draws=0 must be a whole number from 1 to 4,096, or null."),
        ("rounds=2.5", "rounds=2.5 must be a whole number from 1 to 30."),
        ("seed=1.9", "seed=1.9 must be a whole number from 0 to 2**63 - 1."),
        ("data.lanes=1.5", "data.lanes=1.5 must be a whole number from 1 to 65,536, or null."),
        ("optimizer=adm", "optimizer=adm is unknown: write adam, adamw, clipped_adam or sgd."),
        ("stop=null", "stop=null is unknown: write budget or converged."),
        ("batchsize=3", "option batchsize is unknown (do you mean batch_size?): svi train --help lists them."),
        ("+lr=3", "option lr is unknown (do you mean optimizer.lr?): svi train --help lists them."),
        ("optimizer.learning_rate=3", "option optimizer.learning_rate is unknown (do you mean optimizer.lr?)"),
        ("seed=1,2", "seed=1,2 is several values: write seed=[1,2] for a list; -m tries one by one."),
        ("seed=[1", "seed=[1 cannot be read: put the value in quotes"),
        ("seed", "seed is not an option: write KEY=VALUE"),
        ("trainer=9", "trainer=9 is unknown: write auto, cpu, ddp, ddp_sim or gpu."),
        ("hydra/sweeper=optuna hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials=0 must be a whole number from 1 up."),
        ("checkpoint=5", "checkpoint=5 must have its options given one by one: checkpoint.every_n_steps="),
        ("data.path=", 'data.path="" must be a folder, a file or an address, or several as [a,b].'),
    ],
)
def test_words_of_a_command(words, sentence):
    with pytest.raises(UserError) as refused:
        check("train", ["data.path=x", *words.split()])
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_sweep_is_judged_by_each_value_that_it_tries():
    check("train", ["data.path=x", "optimizer.lr=0.1,0.2", "optimizer=adam,sgd", "seed=range(0,5)"], sweep=True)
    for word, sentence in (
        ("optimizer.lr=0.1,-0.2", "optimizer.lr=-0.2 must be a number above 0"),
        ("seed=choice(1,2.5)", "seed=2.5 must be"),
        ("optimizer.lr=interval(-1,1)", "optimizer.lr=-1"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            check("train", ["data.path=x", word], sweep=True)


class Word(enum.Enum):
    ADAM = "adam"


@pytest.mark.parametrize(
    ("name", "value", "held"),
    [
        ("max_steps", np.int64(30), 30),
        ("max_epochs", np.float64(2), 2.0),
        ("batch_size", np.int32(100), 100),
        ("batch_size", "100", 100),
        ("batch_size", 1e3, 1000),
        ("optimizer.lr", np.float32(0.5), 0.5),
        ("optimizer.lr", np.array(0.25), 0.25),
        ("optimizer.lr", "0.01", 0.01),
        ("run_dir", Path("a b [1] ü=1, c"), "a b [1] ü=1, c"),
        ("dtype", torch.float64, "float64"),
        ("dtype", np.float32, "float32"),
        ("dtype", np.dtype("float32"), "float32"),
        ("global_sites", "total", ("total",)),
        ("global_sites", ["a", "b"], ("a", "b")),
        ("debug", np.bool_(True), True),
        ("checkpoint.track", "true", True),
    ],
)
def test_a_value_of_python_or_numpy_is_what_it_says(name, value, held):
    made = of_call("train", {"data.path": "x", name: value})
    found = reduce(getattr, name.split("."), made)
    assert (found, type(found)) == (held, type(held))


def test_a_group_is_chosen_by_a_word_or_changed_by_its_options():
    assert of_call("train", {"data.path": "x", "optimizer": Word.ADAM}).optimizer._target_.endswith("Adam")
    assert of_call("train", {"data.path": "x", "optimizer": {"lr": 0.3}}).optimizer.lr == 0.3
    for chosen, sentence in (
        ({"optimizer": 3}, "optimizer=3 must be a choice"),
        ({"optimizer": "adan"}, "optimizer=adan is unknown: write adam, "),
        ({3: 4}, "option 3 is unknown"),
        ({"batch_size": object()}, "must be a whole number from 1 up."),
        ({"run_dir": object()}, "must be text."),
        ({"data.path.x": 3}, "option data.path.x is unknown"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            of_call("train", {"data.path": "x", **chosen})


def test_a_record_is_not_changed_and_goes_through_a_file(tmp_path):
    made = of_call("train", {"data.path": ["a", "b"], "optimizer.lr": 0.1, "logger": "tensorboard"})
    with pytest.raises(AttributeError):
        made.seed = 3
    with pytest.raises(Exception, match="read-only"):
        made.optimizer.lr = 0.3
    OmegaConf.save(resolved(made), tmp_path / "resolved.yaml")
    assert resolved(options("train", OmegaConf.load(tmp_path / "resolved.yaml"))) == resolved(made)


@pytest.mark.parametrize("words", ["batch_size=abc", "optimizer=adm", "-m optimizer.lr=0.1,-1", "nonsense=1"])
def test_a_command_that_may_not_be_leaves_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["svi"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *words.split(), "data.path=nowhere", "model=linear"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_itself(tmp_path):
    done = svi("train", "data.path=nowhere", f"run_dir={tmp_path}/run", "batch_size=0")
    assert done.returncode == 2
    assert done.stderr == "svi train: batch_size=0 must be a whole number from 1 up.\n"
    assert not list(tmp_path.iterdir())
