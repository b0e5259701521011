"""AnnData's `.h5ad` files, read in place: `X` (csr or dense) and the columns of `obs` by their names.

Layers are "layers/NAME", embeddings "obsm/NAME". Source of the format: anndata.readthedocs.io, "On-disk format". As in
`trainer.data.sources.formats`. Shapes: B rows of a batch.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.data.address import Place, is_address
from trainer.data.fields import CsrRows, Field, Piece, Raw, arrow_field, choose, numpy_field
from trainer.data.sources.place import opened
from trainer.errors import UserError

_PIECE_ROWS = 1 << 16


def inspect_h5ad(file: Place, names: Sequence[str] | None) -> tuple[dict[str, Field], list[Piece]]:
    """Without ``names``: X and obs."""
    with _file(file) as root:
        places = _places(root, file)
        plain = [name for name, place in places.items() if place.startswith(("X", "obs/"))]
        chosen = choose(plain if names is None else names, list(places), file)
        genes = tuple(_words(root["var"][root["var"].attrs["_index"]], 0, None))
        fields = {name: _field(root[places[name]], name, file, genes) for name in chosen}
        rows = _length(root["obs"][root["obs"].attrs["_index"]])
        starts = range(0, rows, _PIECE_ROWS)
        return fields, [Piece(min(_PIECE_ROWS, rows - at), at, min(at + _PIECE_ROWS, rows)) for at in starts]


def read_h5ad(file: Place, fields: Mapping[str, Field], rows: int, piece: Piece) -> Iterator[dict[str, Raw]]:
    with _file(file) as root:
        places = _places(root, file)
        for first in range(piece.at, piece.stop, rows):
            stop = min(first + rows, piece.stop)
            yield {name: _rows(root[places[name]], first, stop) for name in fields}


@contextmanager
def _file(file: Place) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            f"'{file}' needs a library that is not installed ({error}): pip install 'svi-trainer[h5ad]'."
        ) from error
    if not is_address(file):
        with h5py.File(file, "r") as root:
            yield root
        return
    with opened(file) as stream, h5py.File(stream, "r") as root:
        yield root


def _places(root: Any, file: Place) -> dict[str, str]:
    """Where each column is."""
    if "obs" not in root or "var" not in root or "column-order" not in root["obs"].attrs:
        raise UserError(f"'{file}' is no AnnData file of version 0.7 or later: write it again with anndata.")
    found = {"X": "X"} if "X" in root else {}
    found |= {str(name): f"obs/{name}" for name in root["obs"].attrs["column-order"]}
    return found | {
        f"{group}/{name}": f"{group}/{name}" for group in ("layers", "obsm") for name in root.get(group, ())
    }


def _kind(item: Any) -> str:
    return str(item.attrs.get("encoding-type", "array"))


def _length(item: Any) -> int:
    return len(item["codes"] if _kind(item) == "categorical" else item)


def _field(item: Any, name: str, file: Place, genes: tuple[str, ...]) -> Field:
    kind = _kind(item)
    if kind == "csr_matrix":
        width = int(item.attrs["shape"][1])
        of_genes = genes if name == "X" or name.startswith("layers/") else ()
        return Field("csr", (width,), item["data"].dtype.name, len(item["data"]), of_genes)
    if kind == "csc_matrix":
        raise UserError(
            f"'{name}' of '{file}' is stored by columns (csc), which cannot be read by rows: write it by rows, as in "
            "adata.X = adata.X.tocsr()."
        )
    if kind == "array":
        return numpy_field(item.dtype, item.shape[1:])
    if kind in ("categorical", "string-array", "nullable-integer", "nullable-boolean", "nullable-string-array"):
        return arrow_field(_rows(item, 0, 0).type)  # type: ignore[union-attr]
    return Field(kind)


def _rows(item: Any, first: int, stop: int) -> Raw:
    kind = _kind(item)
    if kind == "csr_matrix":
        bounds = item["indptr"][first : stop + 1].astype(np.int64)
        low, high = int(bounds[0]), int(bounds[-1])
        return CsrRows(bounds - low, item["indices"][low:high], item["data"][low:high], int(item.attrs["shape"][1]))
    if kind == "array":
        return item[first:stop]
    if kind == "categorical":
        codes, kinds = item["codes"][first:stop], pa.array(_rows(item["categories"], 0, sys.maxsize))
        kinds = pa.array(map(str, kinds.to_pylist())) if pa.types.is_boolean(kinds.type) else kinds
        ordered = bool(item.attrs.get("ordered", False))
        return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), kinds, ordered=ordered)
    if kind == "string-array":
        return pa.array(_words(item, first, stop), pa.string())
    values, mask = item["values"], item["mask"][first:stop].astype(bool)
    if kind == "nullable-string-array":
        return pa.array(_words(values, first, stop), pa.string(), mask=mask)
    return pa.array(values[first:stop], mask=mask)


def _words(item: Any, first: int, stop: int | None) -> list[str]:
    return [str(word) for word in item.asstr()[first:stop]]
