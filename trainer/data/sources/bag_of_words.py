"""Documents as counts of words: UCI's bag of words and David Blei's lda-c, as one csr column `counts`.

`docword.NAME.txt[.gz]` has three lines (documents, words, triples) and then lines "document word count", from 1 on, by
document; a `.ldac` (or `.dat`) file a line "distinct word:count ..." a document, from 0 on. The words, if there are
any, are the lines of `vocab.NAME.txt`, or `vocab.txt`, beside it. As in `trainer.data.sources.formats`.

Shapes: B documents.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import PurePosixPath
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from trainer.data.address import Place
from trainer.data.fields import CsrRows, Field, Piece, Raw, choose
from trainer.data.sources.place import is_compressed, opened, stamp
from trainer.data.sources.svmlight import svmlight_rows
from trainer.data.sources.text import piece_text, texts
from trainer.errors import UserError, counted

NAME = "counts"
_READ = pa_csv.ReadOptions(column_names=["document", "word", "count"])
_PARSE = pa_csv.ParseOptions(delimiter=" ")
_CONVERT = pa_csv.ConvertOptions(column_types=dict.fromkeys(("document", "word", "count"), pa.int64()))


def inspect_docword(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    """The file is read through, and checked."""
    choose(names, [NAME], file)
    return _docword(file, stamp(file))


def read_docword(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    width, dtype = fields[NAME].shape[0], fields[NAME].dtype
    with opened(file) as stream:
        _header(stream, file)
        row = 0 if piece.at == stream.tell() else None  # of the first document of the piece
        done, held = 0, np.empty((0, 3), np.int64)
        stream.seek(piece.at)
        for at, text in texts(stream, piece.stop):
            triples = np.concatenate([held, _triples(text)])
            row = int(triples[0, 0]) - 1 if row is None else row
            last = at + len(text) >= piece.stop
            whole = piece.rows - done if last else int(triples[-1, 0]) - 1 - row - done
            here = int(np.searchsorted(triples[:, 0], row + done + whole, "right"))
            yield from _batches(triples[:here], row + done, whole, width, dtype, rows)
            held, done = triples[here:], done + whole
        if done < piece.rows:  # no triple at all
            yield from _batches(held, done, piece.rows - done, width, dtype, rows)


def _batches(
    triples: np.ndarray, first: int, count: int, width: int, dtype: str, rows: int
) -> Iterator[dict[str, Raw]]:
    """``count`` documents from number ``first`` (from 0) on."""
    offsets = np.searchsorted(triples[:, 0], np.arange(first + 1, first + count + 2))
    made = CsrRows(offsets.astype(np.int64), triples[:, 1] - 1, triples[:, 2].astype(dtype), width)
    for start in range(0, count, rows):
        yield {NAME: made[start : min(start + rows, count)]}


def _header(stream: IO[bytes], file: Place) -> tuple[int, int, int]:
    """Documents, words and triples."""
    lines = [stream.readline(32) for _ in range(3)]
    if not all(line.strip().isdigit() for line in lines):
        raise UserError(
            f"'{file}' does not begin with three lines of a number each, as bags of words do (docword.NAME.txt): give "
            "a table of another format its suffix."
        )
    return int(lines[0]), int(lines[1]), int(lines[2])


def _triples(text: bytes) -> np.ndarray:
    """int64 [lines, 3]: document, word, count."""
    table = pa_csv.read_csv(io.BytesIO(text), read_options=_READ, parse_options=_PARSE, convert_options=_CONVERT)
    return np.stack([column.to_numpy() for column in table.columns], axis=1)


@lru_cache(maxsize=64)
def _docword(file: Place, _changed: object) -> tuple[dict[str, Field], list[Piece]]:
    with opened(file) as stream:
        documents, words, entries = _header(stream, file)
        starts = [(stream.tell(), 0)]  # of the pieces: the byte, the document (from 0)
        end, last, seen, most = stream.tell(), 0, 0, 0
        for at, text in texts(stream):
            triples = _triples(text)
            document = triples[:, 0]
            if document[0] < last or (np.diff(document) < 0).any() or document[-1] > documents or document[0] < 1:
                raise UserError(f"'{file}' has documents out of order, or beyond {documents:,}: sort its lines.")
            if triples[:, 1].min() < 1 or triples[:, 1].max() > words or triples[:, 2].min() < 0:
                raise UserError(f"'{file}' has a word beyond 1 to {words:,}, or a negative count: fix it.")
            new = int(np.searchsorted(document, last, "right"))
            if seen and new < len(triples) and not is_compressed(file):
                lines = np.flatnonzero(np.frombuffer(text, np.uint8) == 10)
                starts.append((at + int(lines[new - 1]) + 1 if new else at, int(document[new]) - 1))
            end, last, seen = at + len(text), int(document[-1]), seen + len(triples)
            most = max(most, int(triples[:, 2].max()))
    if seen != entries:
        raise UserError(f"'{file}' has {seen:,} triples where it says {entries:,}: copy it again.")
    starts.append((end, documents))
    pieces = [Piece(b[1] - a[1], a[0], b[0]) for a, b in pairwise(starts) if b[1] > a[1]]
    return {NAME: _field(file, words, most, entries)}, pieces


def inspect_ldac(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    """The file is read through, and checked."""
    choose(names, [NAME], file)
    return _ldac(file, stamp(file))


def read_ldac(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    _, counts, words, values = svmlight_rows(piece_text(file, piece))
    offsets = np.concatenate([[0], counts.cumsum()])
    made = CsrRows(offsets, words, values.astype(fields[NAME].dtype), fields[NAME].shape[0])
    for first in range(0, len(made), rows):
        yield {NAME: made[first : first + rows]}


@lru_cache(maxsize=64)
def _ldac(file: Place, _changed: object) -> tuple[dict[str, Field], list[Piece]]:
    pieces, width, most, entries = [], 0, 0, 0
    with opened(file) as stream:
        for at, text in texts(stream):
            distinct, counts, words, values = svmlight_rows(text)
            if not np.array_equal(distinct, counts) or words.min(initial=0) < 0 or values.min(initial=0) < 0:
                raise ValueError("a line is not 'distinct word:count ...'")
            pieces.append(Piece(len(counts), at, at + len(text)))
            entries, width = entries + len(words), max(width, int(words.max(initial=-1)) + 1)
            most = max(most, int(values.max(initial=0)))
    known = _vocabulary(file)
    return {NAME: _field(file, max(width, len(known), 1), most, entries)}, pieces


def _field(file: Place, width: int, most: int, entries: int) -> Field:
    words = _vocabulary(file)
    if words and len(words) != width:
        raise UserError(
            f"the vocabulary beside '{file}' has {counted(len(words), 'word')} for {width:,}: give it its own."
        )
    return Field("csr", (width,), "uint16" if most < 2**16 else "int32", entries, words)


def _vocabulary(file: Place) -> tuple[str, ...]:
    """The words of the file beside ``file``, or none."""
    path = PurePosixPath(str(file))
    stem = path.name.removesuffix(".gz")
    own = stem.replace("docword", "vocab", 1)
    for name in dict.fromkeys((own, "vocab.txt")):
        if name == stem:
            continue
        try:
            with opened(str(file).removesuffix(path.name) + name) as stream:
                return tuple(line.strip() for line in stream.read().decode().splitlines())
        except (OSError, UserError):
            continue
    return ()
