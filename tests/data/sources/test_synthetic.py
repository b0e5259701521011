"""A computed source: the same rows in every pass, whatever the batch."""

import numpy as np
import pytest

from trainer.data.fields import Field
from trainer.data.sources.synthetic import SyntheticSource
from trainer.errors import UserError


def sample(generator: np.random.Generator, first_row: int, rows: int) -> dict[str, np.ndarray]:
    return {"x": generator.normal(size=(rows, 3)), "row": np.arange(first_row, first_row + rows)}


def read(source: SyntheticSource, rows: int) -> dict[str, np.ndarray]:
    batches = list(source.batches(rows))
    assert all(len(batch["row"]) <= rows for batch in batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_rows_do_not_depend_on_the_batch_or_the_pass() -> None:
    source = SyntheticSource(sample, 20_000, seed=3)
    assert source.fields == {"x": Field("float", (3,)), "row": Field("int")}
    whole = read(source, 1 << 20)
    assert whole["row"].tolist() == list(range(20_000))
    for rows in (1 << 20, 8192, 999):
        again = read(source, rows)
        assert all(np.array_equal(again[name], whole[name]) for name in whole)


def test_seeds_differ_and_chunks_do_too() -> None:
    one, two = (read(SyntheticSource(sample, 16_384, seed=seed), 8192)["x"] for seed in (0, 1))
    assert not np.isin(one, two).any()
    assert len(np.unique(one)) == one.size


def test_names_limit_the_columns() -> None:
    assert [batch.keys() for batch in SyntheticSource(sample, 5).batches(5, ["row"])] == [{"row"}]


def test_refusals() -> None:
    with pytest.raises(UserError, match="at least one row, not 0"):
        SyntheticSource(sample, 0)
    with pytest.raises(UserError, match=r"column 'x' of shape \[2\]: it was asked for 10 rows"):
        SyntheticSource(lambda generator, first_row, rows: {"x": np.zeros(2)}, 10)
