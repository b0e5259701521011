"""CSV: a column is what all of its cells are, by one rule for any number of pieces.

As in `trainer.data.sources.formats`.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from trainer.data.address import Place
from trainer.data.fields import LONG, NOT_UTF8, TWICE, Field, Piece, Raw, arrow_field, choose
from trainer.data.sources.place import opened
from trainer.data.sources.text import arrow_type, in_blocks, piece_text, texts

_LONGEST_CELL = 1 << 24  # bytes
_OTHER_MARKS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_PADDED = r"^[ \t]*0(\d+|[xX][0-9a-fA-F]+)[ \t]*$"
_ENDS, _DIGITS = np.zeros(256, bool), np.zeros(256, bool)
_ENDS[list(b',"\r\n \t')] = _DIGITS[list(b"0123456789abcdefABCDEFxX")] = True
_LADDERS = (  # of kinds, each of which holds the cells of those before it; of the last, with "?", only some
    ("int", LONG, "float"),
    ("int", "bool", "bool?"),
    ("date32[day]", "timestamp[s]"),
    ("date32[day]", "timestamp[s]", "timestamp[ns]", "timestamp[ns]?"),
    ("timestamp[s, tz=UTC]", "timestamp[ns, tz=UTC]", "timestamp[ns, tz=UTC]?"),
)
_CLOSED = re.compile(rb'(?:[^"]++|"(?<![^,\r\n]")(?:[^"]++|"")*+"|"(?<=[^,\r\n]"))*+')
"""What of a CSV text is no open cell. A quote opens one where a cell begins, and is a quote elsewhere."""


def _open_cell(text: bytes, first: int = 0) -> int:
    """Where in CSV lines, from ``first`` on, the quoted cell begins that does not end in them; or their length."""
    found = _CLOSED.match(text, first)
    assert found is not None
    return found.end()


def _whole_rows(text: bytes, stream: IO[bytes]) -> bytes:
    """CSV lines to the end of the last cell that holds a line break. Raises ValueError for a quote that never ends."""
    at = 0
    while (at := _open_cell(text, at)) < len(text):
        more = stream.read(len(text) - at) if len(text) - at < _LONGEST_CELL else b""
        if not more:
            begin = text[at : at + 40].decode(errors="replace").partition("\n")[0]
            raise ValueError(f"the cell that begins with {begin} is never closed by another quote")
        text += more + (stream.readline() if not more.endswith(b"\n") else b"")
    return text


def _csv_header(stream: IO[bytes]) -> list[str]:
    first = stream.readline()
    if _open_cell(first) < len(first):
        raise ValueError("its header has a line break within a name")
    names: list[str] = pa_csv.read_csv(io.BytesIO(first), pa_csv.ReadOptions(block_size=len(first) + 1)).column_names
    other = next((word for mark, word in _OTHER_MARKS.items() if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        raise ValueError(f"{other} separate its columns: save it with commas, or as Parquet")
    return names


def _csv_table(text: bytes, header: Sequence[str], types: Mapping[str, pa.DataType | None]) -> pa.Table:
    """The columns of ``types`` of lines of a file; a type that is None is that of all their values."""
    parsing = pa_csv.ParseOptions(newlines_in_values=b'"' in text)
    converting = pa_csv.ConvertOptions(
        include_columns=list(types),
        column_types={name: kind for name, kind in types.items() if kind is not None},
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )

    def read(block: int) -> pa.Table:
        reading = pa_csv.ReadOptions(column_names=header, block_size=block)
        return pa_csv.read_csv(io.BytesIO(text), reading, parsing, converting)

    return in_blocks(text, read)


def _kinds(text: bytes, header: Sequence[str], table: pa.Table) -> dict[str, str]:
    """The kinds of the columns of ``table``, read from ``text``: text also where numbers are not what is written."""
    kinds = {
        name: NOT_UTF8 if pa.types.is_binary(kind) else arrow_field(kind).kind
        for name, kind in zip(table.column_names, table.schema.types)
    }
    kinds |= dict.fromkeys(_padded(text, header, table, kinds), "text")
    beyond = [name for name, kind in kinds.items() if kind == "float" and _is_beyond(table.column(name))]
    if beyond:
        import pyarrow.compute as pc

        words = _csv_table(text, header, dict.fromkeys(beyond, pa.string()))
        for name in beyond:
            if pc.all(pc.match_substring_regex(words.column(name), r"^[ \t]*-?\d+[ \t]*$")).as_py():
                kinds[name] = LONG
    return kinds


def _padded(text: bytes, header: Sequence[str], table: pa.Table, kinds: Mapping[str, str]) -> set[str]:
    """The columns of numbers of ``table``, read from ``text``, that have a cell such as 007 or 0x1F."""
    found: set[str] = set()
    left = _count_padded(text)
    for kind in ("int", "text", "float"):  # floats last: they are rarely such, and have to be read once more
        names = [name for name in table.column_names if kinds[name] == kind]
        if left <= 0 or not names:
            continue
        import pyarrow.compute as pc

        words = table if kind == "text" else _csv_table(text, header, dict.fromkeys(names, pa.string()))
        for name in names:
            count = pc.sum(pc.match_substring_regex(words.column(name), _PADDED)).as_py() or 0
            left -= count
            found |= {name} if count and kind != "text" else set()
    return found


def _count_padded(text: bytes) -> int:
    """How many cells of CSV lines may be of a zero and more digits; words within a cell count too."""
    marks = np.frombuffer(b"\n" + text + b"\n", np.uint8)
    at = np.flatnonzero(marks == ord("0"))
    at = at[_ENDS[marks[at - 1]] & _DIGITS[marks[at + 1]]] + 1
    count = 0
    while len(at):
        after = marks[at + 1]
        count += int(_ENDS[after].sum())
        at = at[_DIGITS[after]] + 1
    return count


def _is_beyond(column: pa.ChunkedArray) -> bool:
    """Whether a column of floats has one that no integer of 64 bits is."""
    values = np.abs(column.to_numpy())
    return bool(((values >= 2.0**63) & np.isfinite(values)).any())


def join_csv(known: Field | None, found: Field, _name: str, _file: Place) -> Field:
    """The field of the cells of both, in any order; its kind ends in "?" where `settle_csv` has to try it."""
    kinds = {found.kind} | ({known.kind} if known else set())
    for kind in (TWICE, NOT_UTF8):
        if kind in kinds:
            return Field(kind)
    kinds = kinds - {"null"} or {"null"}
    if len(kinds) == 1:
        return Field(kinds.pop())
    for ladder in _LADDERS:
        if kinds <= set(ladder):
            return Field(ladder[-1] if ladder[-1].endswith("?") else max(kinds, key=ladder.index))
    return Field("text")


def settle_csv(
    files: Sequence[Place], fields: Mapping[str, Field], pieces: Sequence[tuple[int, Piece]]
) -> dict[str, Field]:
    """``fields`` that `join_csv` has made of all ``pieces``, where what had to be tried is tried, or else text."""
    tried = {name: field.kind.removesuffix("?") for name, field in fields.items() if field.kind.endswith("?")}
    open_ones = {*tried, *(name for name, field in fields.items() if field.kind == LONG)}
    for number, piece in pieces:
        if not tried:
            break
        with opened(files[number]) as stream:
            header = _csv_header(stream)
        text = piece_text(files[number], piece)
        for name, kind in list(tried.items()):
            try:
                _csv_table(text, header, {name: arrow_type(kind)})
            except pa.ArrowInvalid:
                del tried[name]
    return {name: Field(tried.get(name, "text")) if name in open_ones else field for name, field in fields.items()}


def _csv_texts(file: Place) -> Iterator[tuple[list[str], int, bytes]]:
    """The header of a file with each of its texts of whole rows and its place."""
    with opened(file) as stream:
        header = _csv_header(stream)
        for at, text in texts(stream, whole=_whole_rows):
            yield header, at, text


def inspect_csv(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    """Types over all rows, for `settle_csv`: a column of integers with a fraction somewhere is float, with a word
    somewhere text.

    A column with a number that is not written as such (007, 0x1F) is text, and so is one of integers alone of which
    some are beyond 64 bits. Those are names, not numbers.
    """
    with opened(file) as stream:
        times = Counter(_csv_header(stream))
    chosen = choose(names, [name for name, count in times.items() for _ in range(min(count, 2))], file)
    fields = {name: Field("null" if times[name] == 1 else TWICE) for name in chosen}
    pieces = []
    once = dict.fromkeys(name for name in chosen if times[name] == 1)
    for header, at, text in _csv_texts(file):
        table = _csv_table(text, header, once)
        if len(table):
            pieces.append(Piece(len(table), at, at + len(text)))
        for name, kind in _kinds(text, header, table).items():
            fields[name] = join_csv(fields[name], Field(kind), name, file)
    return fields, pieces


def read_csv(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    with opened(file) as stream:
        header = _csv_header(stream)
    types = {name: arrow_type(field.kind) for name, field in fields.items()}
    table = _csv_table(piece_text(file, piece), header, types)
    for batch in table.combine_chunks().to_batches(max_chunksize=rows):
        yield {name: batch.column(name) for name in fields}
