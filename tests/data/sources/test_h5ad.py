"""AnnData files: the matrix and the columns of obs, as anndata writes them."""

import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from trainer.data.fields import concatenate
from trainer.data.packing.pack import pack
from trainer.data.shards.folder import ShardFolder
from trainer.data.sources import h5ad
from trainer.data.sources.memory import MemorySource
from trainer.data.sources.source import open_source
from trainer.errors import UserError

CELLS, GENES = 100, 12


def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(0.4, (CELLS, GENES)).astype(np.float32)


def write(path: Path, form: str = "csr") -> Path:
    """The groups and attributes of anndata's on-disk format, version 0.1.0."""
    strings = h5py.string_dtype()

    def put(group: Any, name: str, values: Any, kind: str = "array", **options: Any) -> None:
        group.create_dataset(name, data=values, **options).attrs["encoding-type"] = kind

    def matrix(group: Any, name: str, made: Any, kind: str) -> None:
        inner = group.create_group(name)
        inner.attrs.update({"encoding-type": kind, "shape": made.shape})
        for part in ("data", "indices", "indptr"):
            inner[part] = getattr(made, part)

    with h5py.File(path, "w") as root:
        if form == "dense":
            put(root, "X", counts())
        else:
            matrix(root, "X", getattr(sparse, f"{form}_matrix")(counts()), f"{form}_matrix")
        obs, var = root.create_group("obs"), root.create_group("var")
        put(var, "_index", [f"gene {i}" for i in range(GENES)], "string-array", dtype=strings)
        put(obs, "_index", [f"cell {i}" for i in range(CELLS)], "string-array", dtype=strings)
        for group in (obs, var):
            group.attrs["_index"] = "_index"
        obs.attrs["column-order"] = ["kind", "total", "good", "site", "age"]
        kind = obs.create_group("kind")
        kind.attrs["encoding-type"] = "categorical"
        put(kind, "codes", np.where(np.arange(CELLS) == 5, -1, np.arange(CELLS) % 3).astype(np.int8))
        put(kind, "categories", ["b", "nk", "t"], "string-array", dtype=strings)
        put(obs, "total", counts().sum(1))
        put(obs, "good", counts()[:, 0] > 0)
        put(obs, "site", [f"s{i % 2}" for i in range(CELLS)], "string-array", dtype=strings)
        age = obs.create_group("age")
        age.attrs["encoding-type"] = "nullable-integer"
        put(age, "values", np.arange(CELLS))
        put(age, "mask", np.arange(CELLS) == 7)
        matrix(root.create_group("layers"), "raw", sparse.csr_matrix(2 * counts()), "csr_matrix")
        put(root.create_group("obsm"), "X_pca", np.arange(CELLS * 2.0).reshape(CELLS, 2))
    return path


@pytest.mark.parametrize("form", ["csr", "dense"])
def test_the_matrix_and_obs_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(h5ad, "_PIECE_ROWS", 30)
    source = open_source(write(tmp_path / "t.h5ad", form))
    assert list(source.fields) == ["X", "kind", "total", "good", "site", "age"]
    assert source.piece_rows == [30, 30, 30, 10]
    batches = list(source.batches(13))
    x: Any = concatenate([batch["X"] for batch in batches])
    if form == "csr":
        x = sparse.csr_matrix((x.values, x.indices, x.offsets), (CELLS, GENES)).toarray()
        assert source.fields["X"].names[:2] == ("gene 0", "gene 1")
    assert np.array_equal(x, counts())
    assert np.array_equal(concatenate([batch["total"] for batch in batches]), counts().sum(1))
    listed = {n: [each for batch in batches for each in batch[n].tolist()] for n in ("kind", "site", "age")}
    assert listed["kind"] == [None if i == 5 else ["b", "nk", "t"][i % 3] for i in range(CELLS)]
    assert listed["site"] == [f"s{i % 2}" for i in range(CELLS)]
    assert listed["age"] == [None if i == 7 else i for i in range(CELLS)]


def test_cells_are_packed(tmp_path: Path) -> None:
    columns = {"x": "X", "raw": "layers/raw", "pca": "obsm/X_pca", "kind": "kind", "good": "good"}
    train, _ = pack(write(tmp_path / "t.h5ad"), tmp_path / "out", columns=columns, held_out=0, missing="drop")
    assert (train.num_rows, train.meta["dropped"]) == (CELLS - 1, 1)
    assert train.column("x").vocabulary == [f"gene {i}" for i in range(GENES)]
    assert train.column("kind").vocabulary == ["b", "nk", "t"]
    folder = ShardFolder(tmp_path / "out" / "train")
    rows, raw = folder.read_block(0, "row_id"), folder.read_block(0, "raw")
    assert np.array_equal(
        sparse.csr_matrix((raw.values, raw.indices, raw.offsets), (CELLS - 1, GENES)).toarray(), 2 * counts()[rows]
    )
    assert np.array_equal(folder.read_block(0, "pca")[:, 0], 2.0 * rows)
    assert np.array_equal(folder.read_block(0, "good"), counts()[rows, 0] > 0)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    "categories", [["low", "mid", "high"], [10, 2, 7, 1], [0.5, 0.25], [True, False], ["a", "b", "never"]]
)
def test_categories_are_those_of_a_data_frame(tmp_path: Path, categories: list[Any], ordered: bool) -> None:
    kinds = pd.Categorical.from_codes(np.arange(CELLS) % 2, categories, ordered=ordered)  # type: ignore[arg-type]
    with h5py.File(write(tmp_path / "t.h5ad"), "r+") as root:
        group = root["obs/kind"]
        group.attrs["ordered"] = ordered
        group["codes"][:] = kinds.codes
        del group["categories"]
        words = isinstance(categories[0], str)
        group.create_dataset("categories", data=categories, dtype=h5py.string_dtype() if words else None)
        group["categories"].attrs["encoding-type"] = "string-array" if words else "array"
    file, _ = pack(tmp_path / "t.h5ad", tmp_path / "file", columns={"kind": "kind"})
    frame, _ = pack(MemorySource(pd.DataFrame({"kind": kinds})), tmp_path / "frame")
    assert file.column("kind") == frame.column("kind")
    codes = [ShardFolder(tmp_path / name / "train").read_block(0, "kind") for name in ("file", "frame")]
    assert np.array_equal(*codes)


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'X' of .* is stored by columns .csc., which cannot be read by rows"):
        open_source(write(tmp_path / "t.h5ad", "csc"))
    with pytest.raises(UserError, match=r"no column 'totl': do you mean total\?"):
        open_source(write(tmp_path / "u.h5ad"), ["totl"])
    with h5py.File(tmp_path / "old.h5ad", "w") as root:
        root["X"] = np.zeros((3, 2))
    with pytest.raises(UserError, match=r"is no AnnData file of version 0\.7 or later"):
        open_source(tmp_path / "old.h5ad")
    (tmp_path / "broken.h5ad").write_bytes(b"no HDF5")
    with pytest.raises(UserError, match=r"cannot read '.*broken\.h5ad'"):
        open_source(tmp_path / "broken.h5ad")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"pip install 'svi-trainer\[h5ad\]'"):
        open_source(tmp_path / "u.h5ad")
