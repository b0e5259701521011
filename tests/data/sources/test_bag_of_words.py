"""Bags of words: documents come back with their words, from whole files and from pieces."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from trainer.data.fields import CsrRows, concatenate
from trainer.data.packing.pack import pack
from trainer.data.shards.folder import ShardFolder
from trainer.data.sources import text
from trainer.data.sources.source import Source, open_source
from trainer.errors import UserError

DOCUMENTS, WORDS = 60, 30


def counts() -> np.ndarray:
    """A table with documents of no word: the first, one within, and the last two."""
    made = np.random.default_rng(0).poisson(0.3, (DOCUMENTS, WORDS))
    made[[0, 20, 58, 59]] = 0
    return made


def docword(path: Path, table: np.ndarray) -> Path:
    triples = [(d + 1, w + 1, table[d, w]) for d, w in zip(*np.nonzero(table))]
    lines = [len(table), table.shape[1], len(triples), *(" ".join(map(str, triple)) for triple in triples)]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def ldac(path: Path, table: np.ndarray) -> Path:
    lines = [" ".join([str((row > 0).sum()), *(f"{w}:{row[w]}" for w in np.flatnonzero(row))]) for row in table]
    path.write_text("\n".join(lines) + "\n")
    return path


def read(source: Source, rows: int, piece: int | None = None) -> CsrRows:
    batches = [batch["counts"] for batch in source.batches(rows, ["counts"], piece)]
    assert all(0 < len(batch) <= rows for batch in batches)  # type: ignore[arg-type]
    return concatenate(batches)


def dense(rows: CsrRows) -> np.ndarray:
    made = np.zeros((len(rows), rows.width), int)
    made[np.repeat(np.arange(len(rows)), np.diff(rows.offsets)), rows.indices] = rows.values
    return made


@pytest.mark.parametrize("bytes_", [1, 50, 300, 1 << 20])
@pytest.mark.parametrize("name", ["docword.t.txt", "docword.t.txt.gz", "t.ldac", "t.dat"])
def test_every_document_comes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bytes_: int) -> None:
    monkeypatch.setattr(text, "_PIECE", bytes_)
    table = counts()
    source = open_source((docword if "docword" in name else ldac)(tmp_path / name, table))
    assert source.num_rows == DOCUMENTS
    if bytes_ == 50 and not name.endswith(".gz"):
        assert len(source.piece_rows) > 5
    field = source.fields["counts"]
    assert (field.kind, field.dtype, field.entries) == ("csr", "uint16", (table > 0).sum())
    for rows in (7, 1000):
        assert np.array_equal(dense(read(source, rows)), table)
    parts = [read(source, 7, piece) for piece in range(len(source.piece_rows))]
    assert [len(part) for part in parts] == list(source.piece_rows)
    assert np.array_equal(dense(concatenate(parts)), table)


@pytest.mark.parametrize(("name", "words"), [("docword.t.txt", "vocab.t.txt"), ("t.dat", "vocab.txt")])
def test_the_words_beside_a_file_come_into_the_index(tmp_path: Path, name: str, words: str) -> None:
    named = [f"word {i}" for i in range(WORDS)]
    (tmp_path / words).write_text("\n".join(named) + "\n")
    path = (docword if "docword" in name else ldac)(tmp_path / name, counts())
    train, _ = pack(path, tmp_path / "out", held_out=0)
    assert train.column("counts").vocabulary == named
    assert train.column("counts").shape == (WORDS,)
    folder = ShardFolder(tmp_path / "out" / "train")
    assert folder.index.column("counts").vocabulary == named
    assert np.array_equal(dense(folder.read_block(0, "counts")), counts()[folder.read_block(0, "row_id")])
    (tmp_path / words).write_text("one\ntwo\n")
    with pytest.raises(UserError, match="has 2 words for 30: give it its own"):
        open_source(docword(tmp_path / "docword.u.txt", counts()) if words == "vocab.txt" else _touched(path))


def _touched(path: Path) -> Path:
    path.write_bytes(path.read_bytes() + b"\n")
    return path


def test_large_counts_and_several_files(tmp_path: Path) -> None:
    table = counts()
    docword(tmp_path / "docword.a.txt", table)
    docword(tmp_path / "docword.b.txt", table * 70_000)
    source = open_source(tmp_path / "docword.*.txt")
    assert (source.num_rows, source.fields["counts"].dtype) == (2 * DOCUMENTS, "int32")
    assert source.fields["counts"].entries == 2 * (table > 0).sum()
    assert np.array_equal(dense(read(source, 50)), np.concatenate([table, table * 70_000]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "does not begin with three lines of a number each"),
        ("2\n3\n2\n1 1 1\n", "has 1 triples where it says 2"),
        ("2\n3\n2\n2 1 1\n1 1 1\n", "has documents out of order"),
        ("2\n3\n1\n3 1 1\n", "has documents out of order, or beyond 2"),
        ("2\n3\n1\n1 4 1\n", "has a word beyond 1 to 3"),
        ("2\n3\n1\n1 2 x\n", "cannot read"),
    ],
)
def test_a_file_that_is_no_bag_of_words(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "docword.t.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "docword.t.txt")


def test_a_line_that_counts_its_words_wrongly(tmp_path: Path) -> None:
    (tmp_path / "t.ldac").write_text("3 0:1 1:1\n")
    with pytest.raises(UserError, match=r"a line is not 'distinct word:count ...'"):
        open_source(tmp_path / "t.ldac")
