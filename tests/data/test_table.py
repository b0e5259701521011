"""Tables that we write, read back by pandas."""

import gc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from trainer.data.table import table_writer
from trainer.errors import UserError

COLUMNS = {
    "n": np.array([-(2**63), 0, 2**63 - 1]),
    "f": np.array([0.1, np.nan, -1e300]),
    "g": np.array([1 / 3, 2.0, 3.0], np.float32),
    "b": np.array([True, False, True]),
    "t": np.array(["a", "b,c", 'd"e']),
}


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "T.CSV"])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_rows_come_back_as_they_were_written(tmp_path: Path, name: str, at_once: int) -> None:
    with table_writer(tmp_path / name) as write:
        for first in range(0, 3, at_once):
            write({key: values[first : first + at_once] for key, values in COLUMNS.items()})
    is_parquet = name.endswith("parquet")
    found = (pd.read_parquet if is_parquet else pd.read_csv)(tmp_path / name)
    assert list(found) == list(COLUMNS)
    for key, values in COLUMNS.items():
        np.testing.assert_array_equal(found[key].to_numpy().astype(values.dtype), values)
    if is_parquet:
        assert [str(each) for each in pq.read_schema(tmp_path / name).types] == [
            "int64", "double", "float", "bool", "string",
        ]  # fmt: skip


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_what_is_no_number_is_missing(tmp_path: Path, name: str) -> None:
    with table_writer(tmp_path / name) as write:
        write({"f": np.array([1.5, np.nan])})
    if name == "t.csv":
        assert (tmp_path / name).read_text() == '"f"\n1.5\n\n'
    else:
        assert pq.read_table(tmp_path / name)["f"].to_pylist() == [1.5, None]


def test_rows_of_several_numbers_are_lists_of_parquet_alone(tmp_path: Path) -> None:
    x = np.arange(6.0).reshape(3, 2)
    x[1, 1] = np.nan
    with table_writer(tmp_path / "t.parquet") as write:
        write({"x": x, "m": np.arange(12).reshape(3, 2, 2)})
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["x"].to_pylist() == [[0.0, 1.0], [2.0, None], [4.0, 5.0]]
    assert table["m"].to_pylist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(UserError, match=r"one number per row and column: write \.parquet"):  # noqa: SIM117
        with table_writer(tmp_path / "t.csv") as write:
            write({"x": x})
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("t.xlsx", r"t\.xlsx is of no known format: end it in \.parquet or \.csv"), ("t", "is of no known format"),
     ("no/t.csv", r"the folder of .*t\.csv does not exist")],
)  # fmt: skip
def test_a_table_that_cannot_be_is_named_before_anything_is_written(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said), table_writer(tmp_path / name):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_an_error_leaves_the_table_that_was_there_and_no_writer(tmp_path: Path, name: str) -> None:
    """A writer that is left open would end in a file that is closed, and say so on standard error."""

    def halfway() -> None:
        with table_writer(tmp_path / name) as write:
            write({"n": np.arange(3)})
            raise ZeroDivisionError

    (tmp_path / name).write_text("old")
    with pytest.raises(ZeroDivisionError):
        halfway()
    gc.collect()
    assert (tmp_path / name).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_columns_that_change_are_an_error(tmp_path: Path) -> None:
    def changing() -> None:
        with table_writer(tmp_path / "t.parquet") as write:
            write({"n": np.arange(3)})
            write({"m": np.arange(3)})

    with pytest.raises(ValueError, match="schema"):
        changing()
    assert not list(tmp_path.iterdir())
