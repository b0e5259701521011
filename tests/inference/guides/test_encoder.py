"""The network of an encoder, for each kind of column."""

import pytest
import torch
from svi_problems import F64

from trainer.errors import UserError
from trainer.inference.guides.encoder import Encoder, facts_of
from trainer.inference.model.ragged import Csr, Ragged

GENERATOR = torch.Generator().manual_seed(0)
X = 5 + 3 * torch.randn(6, 2, dtype=F64, generator=GENERATOR)
CODES = torch.tensor([0, 2, 1, 1, 0, 2])
OFFSETS = torch.tensor([0, 2, 2, 5, 6, 6, 8])
ENTRIES = torch.randn(8, dtype=F64, generator=GENERATOR)
ITEMS = torch.tensor([3, 1, 0, 1, 2, 2, 3, 0])
SPARSE = Csr(OFFSETS, ENTRIES, ITEMS, 4)
COLUMNS = {
    "x": X,
    "kind": CODES,
    "count": 100 * CODES,
    "words": SPARSE,
    "score": Ragged(OFFSETS, ENTRIES),
    "item": Ragged(OFFSETS, ITEMS),
    "other": Ragged(torch.arange(7), ENTRIES[:6]),
}


def encoder(columns, widths=(5, 4), size=3, **known):
    torch.manual_seed(0)
    made = Encoder(facts_of(columns, known), widths, size)
    params = made.init(columns, X)
    return made, {name: value + 0.1 * torch.randn_like(value) for name, value in params.items()}


def test_what_the_first_rows_tell():
    facts = facts_of(COLUMNS, {"count": {"levels": 7}})
    torch.testing.assert_close(torch.tensor(facts["x"]["mean"], dtype=F64), X.mean(0))
    torch.testing.assert_close(torch.tensor(facts["x"]["sd"], dtype=F64), X.std(0, unbiased=False))
    assert facts["kind"]["levels"] == 3
    assert facts["count"] == {"levels": 7}
    assert facts["words"].keys() == {"scale", "entries", "of"}
    assert facts["score"]["entries"] == pytest.approx(8 / 6)
    assert [facts[name]["of"] for name in ("words", "score", "item", "other")] == ["words", "score", "score", "other"]
    assert facts["item"]["levels"] == 4
    assert facts_of({name: column[:3] for name, column in COLUMNS.items()}, facts) == facts
    assert facts_of({"x": torch.ones(3)}, {})["x"]["sd"] == [1.0]


def test_rows_do_not_meet_and_places_that_are_not_used_do_not_count():
    made, params = encoder(COLUMNS)
    whole = torch.stack(made(params, COLUMNS))
    assert whole.shape == (2, 6, 3)
    at = torch.tensor([4, 0, 2])
    some = {name: column[at] for name, column in COLUMNS.items()}
    padded = {name: column if isinstance(column, torch.Tensor) else column.padded(20) for name, column in some.items()}
    for columns in (some, padded):
        torch.testing.assert_close(torch.stack(made(params, columns)), whole[:, at], rtol=0, atol=1e-12)


def test_sparse_rows_are_those_of_the_dense_ones():
    made, params = encoder({"words": SPARSE})
    scale = made.facts["words"]["scale"]
    facts = {"words": {"mean": [0.0] * 4, "sd": [scale] * 4}}
    of_dense = Encoder(facts, made.widths, made.size)(params, {"words": SPARSE.dense()})
    torch.testing.assert_close(made(params, {"words": SPARSE}), of_dense, rtol=0, atol=1e-12)


def test_entries_of_columns_of_equal_lengths_are_seen_together():
    """A row's sum tells which item had which score; swapping two scores changes it, swapping two entries does not."""
    columns = {name: COLUMNS[name] for name in ("score", "item")}
    made, params = encoder(columns)
    order = torch.tensor([1, 0, *range(2, 8)])
    both = {"score": Ragged(OFFSETS, ENTRIES[order]), "item": Ragged(OFFSETS, ITEMS[order])}
    torch.testing.assert_close(made(params, both), made(params, columns), rtol=0, atol=1e-12)
    one = {**both, "item": columns["item"]}
    assert float((made(params, one)[0] - made(params, columns)[0])[0].abs().max()) > 1e-3


def test_codes_that_the_first_rows_lack_are_all_others():
    made, params = encoder({"kind": CODES}, kind={"levels": 3})
    found = made(params, {"kind": torch.tensor([3, 9, 2])})[0]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_row_without_columns_is_refused():
    with pytest.raises(UserError, match="needs columns of the row to encode"):
        facts_of({}, {})
