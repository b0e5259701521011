"""SVMLight: lines of "y index:value ...", packed dense.

As in `trainer.data.sources.formats`. Shapes: B rows of a piece, D features.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np

from trainer.data.address import Place
from trainer.data.fields import Field, Piece, Raw, choose
from trainer.data.sources.place import opened, stamp
from trainer.data.sources.text import piece_text, texts
from trainer.errors import UserError

_MOST_FEATURES = 10_000  # rows are packed dense


def inspect_svmlight(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    """Lines of "y index:value ...", as columns y and x [D], zero where a line names no value."""
    features, _, whole, pieces = _svmlight_shape(file, stamp(file))
    fields = {"y": Field("int" if whole else "float"), "x": Field("float", (features,))}
    return {name: fields[name] for name in choose(names, list(fields), file)}, pieces


def read_svmlight(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    features, base, whole, _ = _svmlight_shape(file, stamp(file))
    labels, counts, index, value = svmlight_rows(piece_text(file, piece))
    ends = np.concatenate([[0], counts.cumsum()])
    for first in range(0, len(labels), rows):
        here = slice(first, first + rows)
        start, stop = ends[first], ends[min(first + rows, len(labels))]
        x = np.zeros((len(labels[here]), features))
        x[np.arange(len(x)).repeat(counts[here]), index[start:stop] - base] = value[start:stop]
        columns: dict[str, Raw] = {"y": labels[here].astype(np.int64) if whole else labels[here], "x": x}
        yield {name: columns[name] for name in fields}


@lru_cache(maxsize=64)
def _svmlight_shape(file: Place, _changed: object) -> tuple[int, int, bool, list[Piece]]:
    """D, the lowest index (1, or 0 where one is used), whether the labels are whole numbers, and the pieces."""
    pieces, highest, base, whole = [], 0, 1, True
    with opened(file) as stream:
        for at, text in texts(stream):
            labels, _, index, _ = svmlight_rows(text)
            pieces.append(Piece(len(labels), at, at + len(text)))
            whole = whole and bool((labels % 1 == 0).all())
            if len(index):
                highest, base = max(highest, int(index.max())), min(base, int(index.min()))
    features = highest + 1 - base
    if base < 0 or features > _MOST_FEATURES:
        raise UserError(
            f"'{file}' has features numbered from {base} to {highest}: from 0 or 1 on, at most {_MOST_FEATURES:,} can "
            "be packed, as dense columns."
        )
    return features, base, whole, [piece for piece in pieces if piece.rows]


def svmlight_rows(text: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels [B], values a row [B], their indexes and the values [all of them]."""
    lines = [line for each in text.split(b"\n") if (line := each.partition(b"#")[0].strip())]
    counts = np.array([line.count(b":") for line in lines], dtype=np.int64)
    numbers = np.array(b" ".join(lines).replace(b":", b" ").split(), dtype=np.float64)
    if len(numbers) != len(lines) + 2 * counts.sum():
        raise ValueError("a line is not 'label index:value ...'")
    starts = np.cumsum(1 + 2 * counts) - (1 + 2 * counts)
    pairs = np.delete(numbers, starts).reshape(-1, 2)
    return numbers[starts], counts, pairs[:, 0].astype(np.int64), pairs[:, 1]
