"""Rows whose terms are not finite are found by halving: all of them, up to a few, and no other."""

import pytest

from trainer.svi.culprits import _halved


@pytest.mark.parametrize("bad", [set(), {0}, {6}, {2, 3}, {0, 3, 6}, set(range(7))])
def test_halving_finds_the_bad_rows_and_no_others(bad):
    asked = []

    def is_bad(rows):
        asked.append(rows)
        return not bad.isdisjoint(rows)

    assert _halved(is_bad, list(range(7)), at_most=7) == sorted(bad)
    assert set(_halved(is_bad, list(range(7)), at_most=2)) <= bad
    assert len(_halved(is_bad, list(range(7)), at_most=2)) == min(2, len(bad))
    assert all(asked)
