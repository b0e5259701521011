"""Files of text in pieces of whole lines, and what Arrow reads of a piece.

CSV, JSON lines and SVMLight are read in such pieces, each of them by itself. Where a file is cut depends on its size
and on the machine, and what a column is must not: its kind is what its reader's rule makes of the kinds of all pieces,
and its values are read as that kind.
"""

import re
import threading
from collections.abc import Callable, Iterator
from typing import IO

import pyarrow as pa

from trainer.data.address import Place
from trainer.data.fields import NOT_UTF8, Piece
from trainer.data.sources.place import is_compressed, opened, stamp

_PIECE = 1 << 24  # bytes that are read at a time, then to the end of the line
_BLOCK = 1 << 20  # bytes that Arrow takes at a time; no row may be longer
_LONGEST_LINE = 1 << 29  # bytes
_ARROW = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "text": pa.string(), NOT_UTF8: pa.binary()}
_held = threading.local()

Whole = Callable[[bytes, IO[bytes]], bytes]
"""A text of whole lines to one of whole rows, with what it needs of the rest of the file."""


def texts(stream: IO[bytes], stop: int | None = None, whole: Whole | None = None) -> Iterator[tuple[int, bytes]]:
    """The rest of a file (to ``stop``) in texts of whole lines, none of them blank, each with its place."""
    at = stream.tell()
    while text := stream.read(_PIECE if stop is None else min(_PIECE, stop - at)):
        text += _rest_of_line(stream, at + len(text)) if not text.endswith(b"\n") else b""
        text = whole(text, stream) if whole else text
        if text.strip():
            yield at, text
        at += len(text)


def _rest_of_line(stream: IO[bytes], at: int) -> bytes:
    """To the end of the line. Raises ValueError for one that never ends."""
    rest = stream.readline(_LONGEST_LINE)
    if len(rest) == _LONGEST_LINE:
        raise ValueError(f"the line at byte {at:,} is longer than {_LONGEST_LINE >> 20} MB: give a table of short ones")
    return rest


def piece_text(file: Place, piece: Piece) -> bytes:
    """The bytes of a piece.

    A compressed file stays open for the thread's next piece: to go back to one costs all that lies before it.
    """
    if not is_compressed(file):
        with opened(file) as stream:
            stream.seek(piece.at)
            return stream.read(piece.stop - piece.at)
    key = file, stamp(file)
    if getattr(_held, "key", None) != key:
        if hasattr(_held, "stream"):
            _held.stream.close()
        _held.stream, _held.key = opened(file), key
    _held.stream.seek(piece.at)
    content: bytes = _held.stream.read(piece.stop - piece.at)
    return content


def in_blocks(text: bytes, read: Callable[[int], pa.Table]) -> pa.Table:
    """``read(bytes of a block)`` of ``text``: in blocks of 1 MB, on several threads; in one where a row is longer."""
    try:
        return read(min(len(text) + 1, _BLOCK))
    except pa.ArrowInvalid as error:
        if "straddling" not in str(error):
            raise
    return read(len(text) + 1)


def blocks(text: bytes) -> Iterator[bytes]:
    """Whole lines of ``text``, in blocks of about 1 MB."""
    at = 0
    while at < len(text):
        stop = text.find(b"\n", at + _BLOCK - 1) + 1 or len(text)
        yield text[at:stop]
        at = stop


def arrow_type(kind: str) -> pa.DataType | None:
    """The Arrow type of a field's kind, where it has one."""
    if kind in _ARROW:
        return _ARROW[kind]
    if zoned := re.fullmatch(r"timestamp\[(\w+), tz=(.+)\]", kind):
        return pa.timestamp(*zoned.groups())
    try:
        return pa.type_for_alias(kind)
    except ValueError:
        return None
