"""Rows count by a column of weights where one asks for it, and only there."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyro
import pyro.distributions as dist
import pytest
from rich.console import Console

from trainer import UserError, fit
from trainer.data.fields import Field
from trainer.data.packing.pack import pack
from trainer.data.shards.cache import ShardCache
from trainer.data.shards.files import read_index
from trainer.data.shards.index import Column, Index
from trainer.data.sources.memory import MemorySource
from trainer.training.tables import shards_of
from trainer.training.weights import packed_for, shown_to_model, told

KG = np.random.default_rng(0).normal(75, 12, 400)
AGE = np.random.default_rng(1).uniform(20, 80, 400)
COMMON = {"options": {"program": "eager", "threads": 1}, "max_steps": 40}


def of_age(age, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 100.0))
    with pyro.plate("data", len(age)):
        pyro.sample("y", dist.Normal(a + 0.0 * age, 10.0), obs=y)


def of_weight(age, weight, y=None):
    return of_age(age, y)


def of_all(y=None, **columns):
    return of_age(columns["age"], y)


def table(**more):
    return {"age": AGE, "y": 120 + np.random.default_rng(2).normal(0, 10, 400), **more}


def sd(data, model=of_age, **options):
    return float(fit(model, data, progress=False, **{**COMMON, **options}).summary()[0].sd)


ONCE = (400 / 100 + 1e-4) ** -0.5  # the posterior's sd where each row counts once


def test_a_column_of_the_name_multiplies_nothing_and_is_named(capsys):
    """However the table comes: the sd is that of 400 rows."""
    frame = pd.DataFrame(table(weight=KG))
    found = fit(of_age, frame, progress=True, **COMMON)
    assert float(found.summary()[0].sd) == pytest.approx(ONCE, rel=1e-3)
    said = " ".join(capsys.readouterr().out.split())
    assert 'the column "weight" is not used, and each row counts once (weight="weight" has rows count' in said
    assert sd(pa.table(table(weight=KG))) == pytest.approx(ONCE, rel=1e-3)


def test_it_counts_where_it_is_asked_for(tmp_path, capsys):
    """By name, by the map of columns, as a key of a dict, and from shards: sd 1 / sqrt of the sum of the weights."""
    times = np.arange(400) % 3.0
    by_weight = (times.sum() / 100 + 1e-4) ** -0.5
    assert sd(pd.DataFrame(table(freq=times)), weight="freq") == pytest.approx(by_weight, rel=1e-3)
    capsys.readouterr()
    fit(of_age, table(weight=times), progress=True, **COMMON)
    assert f"400 rows stand for {times.sum():,.0f} observations" in " ".join(capsys.readouterr().out.split())
    columns = {"age": "age", "y": "y", "weight": "freq"}
    pack(MemorySource(table(freq=times)), tmp_path / "asked", columns=columns, held_out=0)
    assert sd(tmp_path / "asked") == pytest.approx(by_weight, rel=1e-3)
    pack(MemorySource(table(weight=times)), tmp_path / "whole", held_out=0)
    assert sd(tmp_path / "whole") == pytest.approx(ONCE, rel=1e-3)
    assert sd(tmp_path / "whole", weight="weight") == pytest.approx(by_weight, rel=1e-3)


@pytest.mark.parametrize(
    ("data", "options", "sentence"),
    [
        (table(weight=np.r_[KG[1:], 1e6]), {}, 'row 399 count 1e+06 times: give weight="weight" where that is meant'),
        (table(freq=KG), {"weight": "frq"}, "weight=frq is not a column of the data (age, y, freq)"),
        (table(weight=KG), {"weight": "weight", "model": of_weight}, "the model takes the column"),
        (table(freq=KG), {"weight": 3.5}, "weight=3.5 is not a column"),
        (table(freq=KG), {"weight": True}, "weight=true must be text that is not empty, or null."),
        (table(weight=np.ones((400, 2))), {}, "holds several numbers a row"),
    ],
)
def test_what_cannot_be_one_is_a_sentence(data, options, sentence):
    model = options.pop("model", of_age)
    with pytest.raises(UserError) as refused:
        fit(model, data, progress=False, **COMMON, **options)
    assert sentence in str(refused.value)


def index_of(meta, **more):
    return Index((Column("age", "float32"), Column("weight", "float32", **more)), (), 0, "train", meta)


@pytest.mark.parametrize(
    ("asked", "meta", "model", "shown"),
    [
        (None, {}, of_age, ["age"]),
        ("weight", {}, of_age, ["age", "weight"]),
        (None, {"weight": True}, of_age, ["age", "weight"]),
        (None, {"columns": {"weight": "freq"}}, of_age, ["age", "weight"]),
        (None, {"columns": {"weight": "weight"}}, of_age, ["age"]),
        (None, {}, of_weight, ["age", "weight"]),
        (None, {}, of_all, ["age", "weight"]),
    ],
)
def test_which_columns_a_model_sees(asked, meta, model, shown):
    assert shown_to_model(asked, index_of(meta), model, ["age", "weight"]) == shown


def test_words_are_no_weights_and_another_name_is_packed_as_weight():
    with pytest.raises(UserError, match="holds categories"):
        shown_to_model("weight", index_of({}, vocabulary=["a", "b"]), of_age, ["age", "weight"])
    with pytest.raises(UserError, match=r"pack the table with columns\.weight=freq"):
        shown_to_model("freq", index_of({}), of_age, ["age", "weight"])
    with pytest.raises(UserError, match="weight=weight is not a column"):
        shown_to_model("weight", index_of({}), of_age, ["age"])


def test_the_index_says_what_packing_was_asked_for(tmp_path):
    pack(MemorySource(table(weight=KG)), tmp_path / "whole", held_out=0)
    pack(MemorySource(table(weight=KG)), tmp_path / "asked", held_out=0, columns={"age": "age", "weight": "weight"})
    pack(MemorySource(table(weight=KG)), tmp_path / "like", held_out=0, like=tmp_path / "asked")
    said = {name: "weight" in read_index(tmp_path / name / "train").meta for name in ("whole", "asked", "like")}
    assert said == {"whole": False, "asked": True, "like": True}
    assert told(read_index(tmp_path / "whole" / "train"), ["age"], counts=True) == [
        f'rows count by the column "weight": 400 rows stand for {round(KG.astype("float32").sum()):,} observations'
    ]
    assert told(read_index(tmp_path / "whole" / "train"), ["age", "weight"], counts=False) == []


def test_what_a_table_in_memory_is_packed_with():
    said = []
    fields = {name: Field("float") for name in ("age", "y", "weight", "freq")}
    assert packed_for({"weight": [1, 2]}, fields, {"age", "y"}, None, said.append)["weight"] == "weight"
    assert packed_for({}, fields, {"age", "y"}, "freq", said.append) == {"age": "age", "y": "y", "weight": "freq"}
    assert not said
    assert packed_for(pd.DataFrame(), fields, {"age", "y"}, None, said.append) == {"age": "age", "y": "y"}
    assert len(said) == 1
    assert packed_for(pd.DataFrame(), fields, {"age", "weight"}, None, said.append) == {
        "age": "age",
        "weight": "weight",
    }
    assert len(said) == 1


@pytest.mark.parametrize(
    ("kind", "taken", "goes"),
    [
        (Field("int"), {"x"}, True),
        (Field("float"), {"x"}, False),
        (Field("int", (2,)), {"x"}, False),
        (Field("int"), {"y"}, False),  # no column of entries
    ],
)
def test_the_number_of_a_rows_entries_goes_with_them(kind, taken, goes):
    fields = {"x": Field("float", (3,)), "y": Field("float"), "length": kind}
    assert ("length" in packed_for({}, fields, taken, None, print)) == goes


@pytest.mark.parametrize("names", [["n"], ["n", "weight"]])
def test_a_table_packed_on_the_way_has_the_weights_that_are_asked_for(tmp_path, names):
    """As `svi train weight=n data.path=t.csv` packs it, in a folder of its own."""
    frame = pd.DataFrame({"age": AGE[:20], "y": KG[:20], **dict.fromkeys(names, range(20)), "weight": 7.0})
    frame.drop(columns={"weight"} - set(names)).to_csv(tmp_path / "t.csv", index=False)
    given = [str(tmp_path / "t.csv")], Console(quiet=True), ShardCache(tmp_path / "cache")
    (plain,), (counts,) = shards_of(*given), shards_of(*given, weight="n")
    assert plain != counts == shards_of(*given, weight="n")[0]
    index = read_index(Path(counts) / "train")
    assert {"age", "y", "n", "weight"} <= {column.name for column in index.columns}
    assert index.meta["columns"]["weight"] == "n"
    assert shown_to_model(None, read_index(Path(plain) / "train"), of_age, ["age"]) == ["age"]
    with pytest.raises(UserError, match=r"no column 'm': it has age, y, n"):
        shards_of(*given, weight="m")


def test_a_command_counts_rows_of_a_table_by_the_column_that_it_names(tmp_path, capsys, request):
    x = np.random.default_rng(0).normal(size=(400, 3))
    np.savez(tmp_path / "t.npz", x=x, y=x[:, 0] + KG / 12, freq=np.arange(400) % 3)
    run = request.getfixturevalue("fit")(f"data.path={tmp_path}/t.npz", "weight=freq", "max_steps=5")
    assert 'rows count by the column "weight"' in capsys.readouterr().out
    assert (run / "metrics.json").read_text().endswith("}\n")
