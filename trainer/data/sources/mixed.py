"""Columns of words that are numbers, some or all: one stray word must not turn measurements into categories.

A CSV file does not say what its columns hold: a single "?", or "1,234.5", makes text of a million numbers, and codes of
these. So does a data frame that was read from one. A column of categories (pandas' Categorical) says that it is one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from trainer.data.sources.place import suffix
from trainer.data.sources.source import FileSource, Source
from trainer.errors import UserError

_PLAIN = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
_WRITTEN = r"[+-]?\p{Sc}?\s?[+-]?(\d{1,3}([,.' ]\d{3})+|\d+)([.,]\d+)?\s?[%\p{Sc}]?"
_NUMBER = rf"^\s*({_PLAIN}|{_WRITTEN})\s*$"
"""A number, also with separators, a currency or a percent sign. RE2's syntax."""
_CODE = r"^\s*(0\d+|[+-]?\d{19,})\s*$"
"""Digits that are rather a name: as a number they would lose leading zeros, or their last digits."""
_READ_ROWS = 1 << 16


def refuse_mixed(source: Source, columns: Iterable[str], categories: Iterable[str]) -> None:
    """Raises UserError for a column of ``columns`` of a CSV file, not in ``categories``, that `mixed_columns` names.

    Not for one of nothing but codes (007): as categories it is what it says.
    """
    if not is_csv(source):
        return
    allowed = set(categories)
    names = [name for name in dict.fromkeys(columns) if name not in allowed and name in source.fields]
    found = mixed_columns(source, [name for name in names if source.fields[name].kind == "text"], codes=False)
    if found:
        raise UserError(next(iter(found.values())))


def is_csv(source: Source) -> bool:
    """Whether ``source`` is of CSV files, which have words for everything."""
    return isinstance(source, FileSource) and suffix(source.files[0]) == ".csv"


def as_words(source: Source, names: Iterable[str]) -> Source:
    """``source`` with the columns ``names`` as the words of a CSV file, also where all of them are numbers."""
    if not is_csv(source):
        return source
    assert isinstance(source, FileSource)
    words = {name: source.fields[name]._replace(kind="text") for name in names}
    return replace(source, fields={**source.fields, **words})


def number_like(words: Iterable[Any]) -> bool:
    """Whether any of ``words`` reads as a number."""
    import pyarrow.compute as pc

    text = pa.array([word for word in words if isinstance(word, str)], pa.string())
    return bool(pc.any(pc.match_substring_regex(text, _NUMBER)).as_py())


def first_word(source: Source, name: str) -> tuple[int, str] | None:
    """The row (from 0) and the text of the first cell of a column of text that is no plain number, if there is one."""
    import pyarrow.compute as pc

    first_row = 0
    for batch in source.batches(_READ_ROWS, [name]):
        words = _plain(batch[name])
        plain = pc.match_substring_regex(words, rf"^\s*({_PLAIN})\s*$")
        place = pc.index(pc.and_not(plain, pc.match_substring_regex(words, _CODE)), False).as_py()
        if place >= 0:
            return first_row + place, words[place].as_py()
        first_row += len(words)
    return None


def mixed_columns(source: Source, names: Iterable[str], codes: bool = True) -> Mapping[str, str]:
    """A sentence for each of ``names``, columns of text and no categories, in which words are numbers.

    ``codes``: also where these are nothing but digits that are rather names.
    """
    import pyarrow.compute as pc

    left = dict.fromkeys(names)
    firsts: dict[str, dict[str, tuple[int, str]]] = {name: {} for name in left}
    first_row = 0
    for batch in source.batches(_READ_ROWS, list(left)) if left else ():
        for name in list(left):
            if isinstance(batch[name], pa.DictionaryArray):  # it says that it is one of categories
                del left[name]
                continue
            words, found = _plain(batch[name]), firsts[name]
            plain = pc.match_substring_regex(words, rf"^\s*({_PLAIN})\s*$")
            number = pc.match_substring_regex(words, _NUMBER)
            written = pc.and_not(number, plain)
            code = pc.match_substring_regex(words, _CODE)
            kinds = {"plain": plain, "written": written, "word": pc.invert(number), "code": code}
            for kind, flags in kinds.items():
                place = -1 if kind in found else pc.index(flags, True).as_py()
                if place >= 0:
                    found[kind] = (first_row + place, words[place].as_py())
        first_row += len(next(iter(batch.values())))
    told = {
        name: _sentence(source.name, name, firsts[name])
        for name in left
        if codes or firsts[name].keys() - {"plain", "code"}
    }
    return {name: sentence for name, sentence in told.items() if sentence}


def _sentence(table: str, name: str, found: Mapping[str, tuple[int, str]]) -> str | None:
    """What is wrong with a column of which these are the first words of each kind."""
    numbers = sorted(found[kind] for kind in ("plain", "written") if kind in found)
    if not numbers:
        return None
    row, number = numbers[0]
    if "word" in found:
        at, word = found["word"]
        return (
            f"column '{name}' of '{table}' holds text and numbers ('{word}' in row {at}, '{number}' in row {row}, "
            "counted from 0): fix it, leave the cell empty where it stands for a missing value, or pack it with "
            f"categories=[{name}] where all are names."
        )
    how, remedy = "as text", "make them numbers"
    if "written" in found:
        (row, number), how, remedy = found["written"], "with separators or signs", "remove these"
    elif "code" in found:
        row, number = found["code"]
        zeros = number.strip().startswith("0")
        how = "with leading zeros" if zeros else "with more digits than an integer of 64 bits has"
        remedy = "remove these" if zeros else "write them as floats (1.5e20)"
    return (
        f"column '{name}' of '{table}' holds numbers written {how} ('{number}' in row {row}, counted from 0): "
        f"{remedy}, or pack it with categories=[{name}] where they are names."
    )


def _plain(raw: Any) -> pa.Array:
    """Text as Arrow's, no categories."""
    words = raw if isinstance(raw, pa.Array) else pa.array(raw)
    return words.dictionary_decode() if pa.types.is_dictionary(words.type) else words
