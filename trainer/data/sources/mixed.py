"""Columns of a CSV file whose words are partly numbers: one stray word must not turn measurements into categories."""

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.sources.place import suffix
from trainer.data.sources.source import FileSource, Source
from trainer.errors import UserError

_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_READ_ROWS = 1 << 16


def refuse_mixed(source: Source, columns: Iterable[str], categories: Iterable[str]) -> None:
    """Raises UserError for a column of ``columns``, not in ``categories``, in which some words are numbers.

    A CSV file does not say what its columns hold: a single "?" makes text of a million numbers, and codes of these.
    """
    if not isinstance(source, FileSource) or suffix(source.files[0]) != ".csv":
        return
    allowed = set(categories)
    names = [n for n in dict.fromkeys(columns) if n not in allowed and n in source.fields]
    names = [name for name in names if source.fields[name].kind == "text"]
    found: dict[str, dict[bool, tuple[int, str]]] = {name: {} for name in names}  # first number, first other word
    first_row = 0
    for batch in source.batches(_READ_ROWS, names) if names else ():
        for name, first in found.items():
            words = batch[name]
            assert isinstance(words, pa.Array)
            numeric = pc.match_substring_regex(words, _NUMBER)
            for kind in {True, False} - first.keys():
                place = pc.index(numeric, kind).as_py()
                if place >= 0:
                    first[kind] = (first_row + place, words[place].as_py())
            if len(first) == 2:
                (number_row, number), (row, word) = first[True], first[False]
                raise UserError(
                    f"column '{name}' of '{source.name}' holds text and numbers ('{word}' in row {row}, '{number}' in "
                    f"row {number_row}, counted from 0): mend it, leave the word empty where it stands for a missing "
                    f"value, or write categories=[{name}] where both are names."
                )
        first_row += len(words)
