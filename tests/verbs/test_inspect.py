"""`svi inspect`: what is packed is what is shown."""

import numpy as np
import pytest
import scipy.sparse
from app_tools import config

from trainer.data.packing.pack import pack
from trainer.data.sources.memory import MemorySource
from trainer.errors import UserError
from trainer.verbs import inspect


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("inspect") / "shards"
    table = {
        "x": np.arange(40.0).reshape(20, 2),
        "place": np.array(["here", "there"] * 10),
        "words": scipy.sparse.csr_matrix(np.eye(20, 30, 3) * 2),
    }
    pack(MemorySource(table), out, held_out=0, float_dtype="float64")
    return out


def shown(capsys, monkeypatch, *overrides):
    monkeypatch.setenv("COLUMNS", "120")
    rows = inspect.run(config("inspect", *overrides), None)
    return rows, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_columns_sizes_and_rows_are_shown(folder, capsys, monkeypatch):
    rows, lines = shown(capsys, monkeypatch, f"data.path={folder}", "rows=3")
    assert rows == 20
    assert "x float64 2 19 to 20 11.53 0 to 1 38 to 39" in lines
    assert "place 2 categories 1" in lines
    assert "words csr float64 of 30, those not 0" in lines
    assert any(f"{folder}/train: 20 rows in 1 block of 1 shard," in line for line in lines)
    assert len([line for line in lines if "here" in line]) == 3  # categories as words, a line a row
    row = int(lines[-1].split()[-1])
    assert lines[-1].startswith(f"{2 * row}, {2 * row + 1} ")
    assert f" {'there' if row % 2 else 'here'} " in lines[-1]


def test_without_rows_and_with_too_few(folder, capsys, monkeypatch):
    _, lines = shown(capsys, monkeypatch, f"data.path={folder}", "rows=0")
    assert "20 rows" in lines[-1]
    with pytest.raises(UserError, match="rows=-1 must be a whole number from 0 up"):
        inspect.run(config("inspect", f"data.path={folder}", "rows=-1"), None)


def test_both_splits_are_counted(shards, capsys, monkeypatch):
    rows, lines = shown(capsys, monkeypatch, f"data.path={shards}")
    assert rows == 3000
    assert sum(" rows in " in line for line in lines) == 2
