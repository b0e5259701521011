"""Records from nodes: what they hold, and the sentence for each way in which they cannot."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ReadonlyConfigError

from trainer.errors import UserError
from trainer.options.kinds import Count, Names, Part, PartOf, Parts, Share
from trainer.options.records import Unknown, bound, kinds_of, plain, record

ADAM = {"_target_": "trainer.inference.optim.optimizers.Adam", "lr": "0.1", "beta1": 0.9, "beta2": None, "eps": 1e-8,
        "weight_decay": 0, "decoupled": False}  # fmt: skip


@dataclass(frozen=True)
class Inner:
    share: Share
    words: Names


@dataclass(frozen=True)
class Outer:
    count: Count
    inner: Inner
    maybe: Inner | None
    by_name: dict[str, int]
    part: Part


NODE: dict[str, Any] = {
    "count": "3", "inner": {"share": 0.5, "words": "a"}, "maybe": None, "by_name": {"x": 1, "y": "2"},
    "part": {"_target_": "a.b", "depth": 4},
}  # fmt: skip


def changed(**changes: Any) -> dict[str, Any]:
    return {**NODE, **changes}


def test_a_record_has_what_its_node_says_in_its_types():
    made = record(Outer, NODE)
    assert made == Outer(3, Inner(0.5, ("a",)), None, {"x": 1, "y": 2}, OmegaConf.create(NODE["part"]))
    assert isinstance(made.count, int)
    both = record(Outer, changed(maybe={"share": 0, "words": ["a", "b"]}))
    assert both.maybe == Inner(0.0, ("a", "b"))
    assert record(Outer, OmegaConf.create(NODE)) == made


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (changed(count=0), "count=0 must be a whole number from 1 up."),
        (changed(count="x"), "count=x must be a whole number"),
        (changed(count=2**63), "count=9223372036854775808 must be a whole number from 1 up, below 2**63."),
        (changed(count="???"), "count is missing: give count=VALUE."),
        (changed(inner={"share": 1, "words": "a"}), "inner.share=1 must be a number from 0 and below 1."),
        (changed(inner={"share": 0.5}), "inner.words is missing: give inner.words=VALUE."),
        (changed(inner=3), "inner=3 must have its options given one by one: inner.share=, inner.words=."),
        (changed(inner=None), "inner=null must have its options given one by one"),
        (changed(maybe={"share": 2, "words": []}), "maybe.share=2 must be"),
        (changed(by_name={"x": "one"}), "by_name.x=one must be a whole number"),
        (changed(part="adam"), "part=adam must be a choice (svi VERB --help lists them), or have options below it."),
        (changed(part={"_target_": 3}), "part._target_=3 must be the name of a class or function"),
        ({name: value for name, value in NODE.items() if name != "count"}, "count is missing: give count=VALUE."),
    ],
    ids=str,
)
def test_what_may_not_be_is_named_with_what_may(node, said):
    with pytest.raises(UserError, match=re.escape(said)):
        record(Outer, node)


@pytest.mark.parametrize(
    ("node", "key"),
    [
        (changed(cuont=1), "cuont"),
        (changed(inner={"share": 0.5, "words": "a", "more": 1}), "inner.more"),
        (changed(part={**ADAM, "lrr": 1}), "part.lrr"),
    ],
)
def test_a_key_that_names_no_option_is_told_in_full(node, key):
    with pytest.raises(Unknown, match=f"option {re.escape(key)} is unknown") as found:
        record(Outer, node)
    assert found.value.key == key


def test_the_node_of_a_class_of_ours_has_its_types_and_cannot_be_changed():
    made = bound(Part, ADAM, "optimizer")
    assert isinstance(made, DictConfig)
    assert (made.lr, made.beta2, made._target_) == (0.1, None, ADAM["_target_"])
    with pytest.raises(ReadonlyConfigError):
        made.lr = 1
    with pytest.raises(UserError, match=r"optimizer\.lr=-1 must be a number above 0, or null"):
        bound(Part, {**ADAM, "lr": -1}, "optimizer")


def test_a_class_of_others_takes_what_it_likes_and_words_of_hydras_own_too():
    assert bound(Part, {"_target_": "a.b", "x": [1]}, "model") == {"_target_": "a.b", "x": [1]}
    assert bound(Part, {**ADAM, "_partial_": True}, "optimizer")._partial_
    open_one = {"_target_": "pytorch_lightning.loggers.MLFlowLogger", "experiment_name": "e", "synchronous": True}
    assert bound(Part, open_one, "logger").synchronous
    assert bound(Part, {}, "model") == {}


def test_several_parts_stand_below_names_of_their_own():
    made = bound(Parts, {"one": {"_target_": "a.b"}, "none": None, "two": ADAM}, "logger")
    assert (made.one._target_, made.none, made.two.lr) == ("a.b", None, 0.1)
    with pytest.raises(UserError, match=r"logger\.two\.lr=x must be a number"):
        bound(Parts, {"two": {**ADAM, "lr": "x"}}, "logger")
    with pytest.raises(UserError, match=r"logger\.one=3 must be a choice"):
        bound(Parts, {"one": 3}, "logger")


def test_a_part_with_a_record_of_its_own_has_to_have_its_options():
    kind = Annotated[DictConfig, PartOf(Inner)]
    made = bound(kind, {"share": "0.5", "words": ["a"], "more": 1}, "trainer")
    assert made == {"share": 0.5, "words": ["a"], "more": 1}
    with pytest.raises(UserError, match=r"trainer\.words is missing: give trainer\.words=VALUE"):
        bound(kind, {"share": 0.5}, "trainer")


def test_the_kinds_of_a_record_keep_their_limits():
    assert kinds_of(Inner) == {"share": Share, "words": Names}


def test_a_record_becomes_plain_values_and_comes_back():
    made = record(Outer, changed(maybe={"share": 0, "words": ["a", "b"]}))
    again = plain(made)
    assert again == {
        "count": 3, "inner": {"share": 0.5, "words": ["a"]}, "maybe": {"share": 0.0, "words": ["a", "b"]},
        "by_name": {"x": 1, "y": 2}, "part": {"_target_": "a.b", "depth": 4},
    }  # fmt: skip
    assert type(again["part"]) is dict
    assert record(Outer, again) == made


@pytest.mark.parametrize(
    ("kind", "value", "found"),
    [
        (Literal["a", "b"], "b", "b"),
        (int | None, None, None),
        (int | str, "3", "3"),
        (int | str, 3, 3),
        (tuple[int, ...], 4, (4,)),
        (Any, [1], [1]),
    ],
)
def test_values(kind, value, found):
    assert bound(kind, value, "a") == found
