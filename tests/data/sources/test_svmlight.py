"""SVMLight lines as dense rows, against the same rows written out."""

from pathlib import Path

import numpy as np
import pytest

from trainer.data.fields import Field, Piece
from trainer.data.sources import text
from trainer.data.sources.svmlight import inspect_svmlight, read_svmlight, svmlight_rows
from trainer.errors import UserError


def test_rows_of_a_text() -> None:
    labels, counts, index, value = svmlight_rows(b"# head\n1 3:0.5 7:-2 # a 9:9\n\n-1\r\n2.5e1 1:1e-3\n")
    assert labels.tolist() == [1.0, -1.0, 25.0]
    assert counts.tolist() == [2, 0, 1]
    assert (index.tolist(), value.tolist()) == ([3, 7, 1], [0.5, -2.0, 1e-3])
    assert index.dtype == np.int64


def test_no_rows_are_none() -> None:
    assert [len(each) for each in svmlight_rows(b"# nothing\n\n")] == [0, 0, 0, 0]


@pytest.mark.parametrize("line", [b"1 2", b"1 2:3 4", b"1:2", b"1 2:", b"1 a:2", b"x 1:2", b"1 2:3:4"])
def test_a_line_of_another_form_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"label index:value|could not convert"):
        svmlight_rows(b"1 1:1\n" + line + b"\n")


def rows_of(file: Path, rows: int = 2, names: list[str] | None = None) -> dict[str, np.ndarray]:
    fields, pieces = inspect_svmlight(file, names)
    batches = [batch for piece in pieces for batch in read_svmlight(file, fields, rows, piece)]
    assert all(len(batch[name]) <= rows for batch in batches for name in fields)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in fields}


@pytest.mark.parametrize(
    ("lines", "x"),
    [
        (["1 1:5 3:6", "2", "3 2:7"], [[5, 0, 6], [0, 0, 0], [0, 7, 0]]),
        (["1 0:5 2:6", "2 1:7"], [[5, 0, 6], [0, 7, 0]]),
        (["1 3:6", "2 1:5"], [[0, 0, 6], [5, 0, 0]]),
        (["1 2:5 2:6", "0 1:1"], [[0, 6], [1, 0]]),
    ],
    ids=["from 1", "from 0", "unordered", "twice"],
)
@pytest.mark.parametrize("piece", [1, 1 << 24])
def test_features_are_numbered_from_1_or_from_0_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], x: list[list[float]], piece: int
) -> None:
    monkeypatch.setattr(text, "_PIECE", piece)
    (tmp_path / "t.svm").write_text("\n".join(lines))
    found = rows_of(tmp_path / "t.svm")
    assert found["x"].tolist() == x
    assert found["y"].tolist() == [int(line.split()[0]) for line in lines]
    assert found["y"].dtype == np.int64


def test_one_label_with_a_fraction_makes_all_floats(tmp_path: Path) -> None:
    (tmp_path / "t.svm").write_text("1 1:1\n0.5 1:2\n")
    assert inspect_svmlight(tmp_path / "t.svm", None)[0] == {"y": Field("float"), "x": Field("float", (1,))}
    assert rows_of(tmp_path / "t.svm")["y"].tolist() == [1.0, 0.5]


def test_only_the_columns_that_are_asked_for_come(tmp_path: Path) -> None:
    (tmp_path / "t.svm").write_text("1 1:1\n2 1:2\n")
    assert list(rows_of(tmp_path / "t.svm", names=["x"])) == ["x"]
    with pytest.raises(UserError, match="has no column 'z': it has y, x"):
        inspect_svmlight(tmp_path / "t.svm", ["z"])


def test_a_file_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    path = tmp_path / "t.svm"
    path.write_text("1 1:1\n")
    assert inspect_svmlight(path, None)[1] == [Piece(1, 0, 6)]
    path.write_text("1 1:1 2:2\n2\n")
    fields, pieces = inspect_svmlight(path, None)
    assert (fields["x"].shape, pieces) == ((2,), [Piece(2, 0, 12)])


@pytest.mark.parametrize(("most", "numbered"), [("10000:1", "1 to 10000"), ("10001:1", "1 to 10001")])
def test_as_many_features_as_can_be_packed_dense(tmp_path: Path, most: str, numbered: str) -> None:
    path = tmp_path / f"{most[:5]}.svm"
    path.write_text(f"1 1:1 {most}\n")
    if most == "10000:1":
        assert inspect_svmlight(path, None)[0]["x"].shape == (10_000,)
    else:
        with pytest.raises(UserError, match=f"features numbered from {numbered}: .* at most 10,000"):
            inspect_svmlight(path, None)
