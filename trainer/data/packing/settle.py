"""What is to become of a table: the options of packing, and the recipes that they make of its columns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.data.fields import VARYING, choose
from trainer.data.packing.apply import options_like, recipes_like, words_like
from trainer.data.packing.columns import ColumnMap, Recipe, check_categories, recipes, source_columns
from trainer.data.packing.ingest import ENTRY_BYTES, WEIGHT, Table
from trainer.data.packing.split import Split
from trainer.data.shards.folder import open_split
from trainer.data.shards.index import ROW_ID, Index
from trainer.data.sources.mixed import as_words, mixed_columns, number_like
from trainer.data.sources.source import Source, open_source
from trainer.errors import UserError

_HELD_OUT, _FLOATS = 0.1, ("float32", "float64")


@dataclass(frozen=True)
class Packing:
    """How a table is packed. Raises UserError for options out of range or at odds."""

    columns: ColumnMap | None = None
    """Shard column -> a source column [B], or a list of them, stacked to [B, len] (see `columns`); None: every source
    column under its own name."""
    held_out: float = _HELD_OUT
    """The chance of a row (of a group, with ``group_by``) to be held out, by a hash of ``seed`` and its row number (its
    key). Where no row was drawn there is no `out/held_out`, and None is returned for it."""
    seed: int = 0
    shard_bytes: int = 1 << 27
    block_rows: int = 8192
    """Of a block, which has fewer where these would exceed ``shard_bytes``."""
    missing: str = "error"
    """Or "drop": for rows with a null or NaN, counted in ``Index.meta["dropped"]``."""
    standardize: Sequence[str] = ()
    """Float columns to store as (x - mean) / sd of the training rows, per element, from float64;
    ``Index.meta["standardised"]`` keeps both. A constant element stays as it is (mean 0, sd 1)."""
    standardise: Sequence[str] = ()
    """Further ones, by the other spelling."""
    group_by: str | None = None
    """A source column of integers or text. Rows that share its value become one row, in source order: row shape [...]
    becomes [T, ...], padded by repeating the group's last row; the int64 column "length" counts the real ones, and
    statistics are over these, per element of a source row."""
    split_by: str | None = None
    """A source column of integers or text: ``held_out`` is the chance of each of its values, with all its rows."""
    split_time: str | None = None
    """A column of numbers, times or text, of which the rows at ``split_after`` or later are held out, whatever
    ``held_out`` says."""
    split_after: Any = None
    float_dtype: str | None = None
    """Of floats; None: float32, or float64 for a column of which float32 would round a value by more than 1e-6 of its
    sd."""
    categories: Sequence[str] = ()
    """Columns of text in which numbers are names. Of others, ``Index.meta["mixed"]`` keeps what is wrong with one whose
    words are numbers, some or all."""
    spare: bool = False
    """Leave out what cannot be packed; ``Index.meta["spared"]`` keeps why, by column."""
    like: str | Path | Sequence[str | Path] | None = None
    """A packed folder (or several, as for `open_split`) whose columns, codes, shifts, groups and split this table gets
    too, in place of the options that say them; words that it had not get the next codes."""

    def __post_init__(self) -> None:
        for good, sentence in (
            (
                0 <= self.held_out < 1,
                f"held_out={self.held_out} is not a fraction: give a number from 0 up to, but not including, 1.",
            ),
            (0 <= self.seed < 2**63, f"seed={self.seed} is out of range: give an integer from 0 to 2**63 - 1."),
            (self.shard_bytes >= 1, f"shard_bytes={self.shard_bytes} holds nothing: give a positive number."),
            (self.block_rows >= 1, f"block_rows={self.block_rows} holds nothing: give a positive number."),
            (
                self.missing in ("error", "drop"),
                f"missing={self.missing} is unknown: write missing=error or missing=drop.",
            ),
            (
                self.float_dtype in (None, *_FLOATS),
                f"float_dtype={self.float_dtype} is unknown: write float32 or float64.",
            ),
        ):
            if not good:
                raise UserError(sentence)
        self._check_split()

    def _check_split(self) -> None:
        if (self.split_time is None) != (self.split_after is None):
            raise UserError(
                "split.time and split.after belong together: the column, and from where on rows are held out."
            )
        for name, value in (("group_by", self.group_by), ("split.by", self.split_by)):
            if value is not None and self.split_time is not None:
                raise UserError(f"{name}={value} and split.time={self.split_time} are two splits: give one of them.")
        if self.group_by is not None and self.split_by is not None:
            raise UserError(
                f"split.by={self.split_by} cannot be combined with group_by={self.group_by}: groups are held out whole "
                "already."
            )


def settle(source: Source | str | Path, packing: Packing) -> tuple[Source, Table]:
    """Opens ``source`` and settles what its columns become; columns to be standardized are carried in float64.

    Raises UserError for options that do not fit it, and all that `open_source` and `recipes` refuse.
    """
    packing = replace(packing, standardize=(*packing.standardize, *packing.standardise), standardise=())
    like = None if packing.like is None else _packed(packing.like)
    if like is None:
        asked = packing.columns is not None and WEIGHT in packing.columns
    else:
        packing, asked = _as_packed(packing, like), bool(like.meta.get(WEIGHT))
    opened = _opened(source, packing, like)
    spared: dict[str, str] | None = {} if packing.spare else None
    made = _unreserved(_recipes(opened, packing, like, spared), packing, spared)
    if not made and spared:
        raise UserError(next(iter(spared.values())))
    mixed = _mixed(opened, made, packing.categories) if like is None else like.meta.get("mixed", {})
    _check_kinds(made, packing)
    group = _key(opened, packing.group_by, "group_by", "a group needs an exact key")
    table = Table(
        opened.name,
        opened.num_rows,
        made,
        group,
        _split(opened, packing),
        packing.seed,
        tuple(packing.standardize),
        packing.float_dtype,
        drop=packing.missing == "drop",
        shard_bytes=packing.shard_bytes,
        block_rows=packing.block_rows,
        entry_bytes=sum(opened.fields[r.parts[0]].entries * ENTRY_BYTES for r in made if not r.is_dense),
        shifts=None if like is None else like.meta.get("standardised", {}),
        longest=None if like is None else _longest(like),
        mixed=mixed,
        weighted=asked,
        spared=spared,
    )
    return opened, table


def _packed(place: Any) -> Index:
    """Of the table that is packed at ``place``, without its shards."""
    folder = open_split(place, "train")
    if folder is None:
        raise UserError(f"like={place} is not a shard folder.")
    return replace(folder.index, shards=())


def _as_packed(packing: Packing, like: Index) -> Packing:
    """With what ``like`` was packed by. Raises UserError for an option that says it too."""
    found, usual = options_like(like), {"held_out": _HELD_OUT, "seed": 0}
    for name in ("columns", "standardize", "categories", *found):
        value = getattr(packing, name)
        if value not in (None, (), [], {}, usual.get(name), found.get(name)):
            option = f"split.{name.removeprefix('split_')}" if name.startswith(("split_", "held")) else name
            raise UserError(
                f"{option}={value} cannot be combined with like={packing.like}, which says that: leave it out."
            )
    shifted = [like.column(name).dtype for name in like.meta.get("standardised", {})]
    return replace(
        packing,
        **found,
        columns=like.meta.get("columns", {}),
        standardize=tuple(like.meta.get("standardised", {})),
        float_dtype=shifted[0] if shifted else packing.float_dtype,
    )


def _opened(source: Source | str | Path, packing: Packing, like: Index | None) -> Source:
    """The columns that are packed, as numbers or as words."""
    opened: Source
    if isinstance(source, str | Path):
        keys = [key for key in (packing.group_by, packing.split_by, packing.split_time) if key is not None]
        opened = open_source(source, None if packing.columns is None else source_columns(packing.columns) + keys)
    else:
        opened = source
    check_categories(packing.categories, packing.columns, opened)
    if like is not None:
        return words_like(like, opened)
    given, columns = packing.categories, packing.columns or {}
    named = [*given, *(parts for name, parts in columns.items() if name in given)]
    return as_words(opened, {part for part in named if isinstance(part, str) and part in opened.fields})


def _recipes(opened: Source, packing: Packing, like: Index | None, spared: dict[str, str] | None) -> list[Recipe]:
    if like is not None:
        return recipes_like(like, opened)
    return recipes(opened, packing.columns, packing.float_dtype, packing.standardize, spared, packing.categories)


def _unreserved(made: list[Recipe], packing: Packing, spared: dict[str, str] | None) -> list[Recipe]:
    """``made`` without names that the shards keep for themselves; raises UserError where none may be spared."""
    for name in (ROW_ID,) if packing.group_by is None else (ROW_ID, "length"):
        if any(recipe.name == name for recipe in made):
            sentence = f"the shards keep the column '{name}' for themselves: give yours another name."
            if spared is None:
                raise UserError(sentence)
            made, spared[name] = [recipe for recipe in made if recipe.name != name], sentence
    return made


def _check_kinds(made: Sequence[Recipe], packing: Packing) -> None:
    """Raises UserError for a column that cannot be standardized, and for one that has no place in groups."""
    for name in packing.standardize:
        if name not in {recipe.name for recipe in made if recipe.is_dense and recipe.dtype.startswith("float")}:
            raise UserError(f"standardize={name} names no column of floats: name one of columns, or a list of numbers.")
    if packing.group_by is not None and not all(recipe.is_dense for recipe in made):
        raise UserError(
            f"group_by={packing.group_by} cannot be combined with sparse or ragged columns: leave these out."
        )


def _split(opened: Source, packing: Packing) -> Split:
    by, time = packing.split_by, packing.split_time
    key = _key(opened, by, "split.by", "what is held out needs an exact key")
    if time is not None:
        choose([time], list(opened.fields), opened.name)
        if opened.fields[time].kind in VARYING:
            raise UserError(f"split.time={time} is not a column of one time per row.")
    return Split(packing.held_out, packing.seed, key, time, packing.split_after)


def _mixed(source: Source, made: Sequence[Recipe], categories: Sequence[str]) -> dict[str, str]:
    """What is wrong with columns of codes of numbers, and of text that is numbers in part, none of ``categories``."""
    coded = [r for r in made if r.is_dense and r.vocabulary and not {r.name, r.parts[0]} & set(categories)]
    text = {r.name: r.parts[0] for r in coded if number_like(r.vocabulary or ())}
    sentences = mixed_columns(source, text.values())
    found = {name: sentences[part] for name, part in text.items() if part in sentences}
    for name, part, words in ((r.name, r.parts[0], r.vocabulary or []) for r in coded):
        if not isinstance(words[0], str) and words != list(range(len(words))):
            found[name] = (
                f"column '{part}' of '{source.name}' holds categories of numbers, and the model gets their codes (0 "
                f"stands for {words[0]}): give it as numbers, or pack it with categories=[{name}] if codes are meant."
            )
    return found


def _longest(like: Index) -> int | None:
    """T of a table packed in groups."""
    dense = [column for column in like.columns if column.name not in (ROW_ID, "length")]
    return dense[0].shape[0] if like.meta.get("group_by") and dense else None


def _key(source: Source, name: str | None, option: str, because: str) -> Recipe | None:
    """The recipe of a column whose values are told apart exactly; None for no column."""
    if name is None:
        return None
    found = recipes(source, {"key": name}, "float32")[0]
    if found.dtype != "int64" or found.shape or not found.is_dense:
        raise UserError(f"{option}={name} is not a column of integers or text: {because}.")
    return found
