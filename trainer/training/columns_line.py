"""What is said of the columns of packed data. Nothing here loads torch."""

from collections.abc import Sequence

from trainer.data.shards.index import ROW_ID, Column, Index
from trainer.errors import counted

_MOST = 20


def columns_line(index: Index) -> str:
    """The columns with their types, and those that were left out."""
    columns = [_named(column) for column in index.columns if column.name != ROW_ID]
    lines = f"columns: {_listed(columns)}"
    spared = index.meta.get("spared", {})
    return f"{lines} · left out: {_listed(list(spared))}" if spared else lines


def _listed(names: Sequence[str]) -> str:
    return " · ".join(names[:_MOST]) + (f" · {len(names) - _MOST:,} more" if len(names) > _MOST else "")


def _named(column: Column) -> str:
    shape = f"[{', '.join(map(str, column.shape))}]" if column.shape else ""
    if column.kind != "dense":
        return f"{column.name} {column.dtype} {'sparse' if column.kind == 'csr' else 'lists'}{shape}"
    if column.vocabulary is None:
        return f"{column.name} {column.dtype}{shape}"
    count, first = counted(len(column.vocabulary), "category", "categories"), column.vocabulary[0]
    told = "" if isinstance(first, str) and not first.isdigit() else f" (0 stands for {first})"
    return f"{column.name} {count}{told}{shape}"
