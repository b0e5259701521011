"""What is an address, and what fsspec makes of it."""

import sys

import pytest

from trainer.data.address import filesystem, is_address
from trainer.errors import UserError


@pytest.mark.parametrize("place", ["s3://bucket/a", "https://host/a.csv", "memory://a", "file:///a"])
def test_addresses(place: str) -> None:
    assert is_address(place)


@pytest.mark.parametrize("place", ["a", "/a/b.csv", "c:/a", "a:b", "", None])
def test_paths(place: object) -> None:
    assert not is_address(place)


def test_the_bytes_at_an_address_are_those_that_were_put_there() -> None:
    system, path = filesystem("memory://units/a.bin")
    system.pipe(path, b"abc")
    again, place = filesystem("memory://units/a.bin")
    assert again.cat(place) == b"abc"
    again.rm(place)


def test_an_address_of_an_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match=r"nosuch://x is not a readable address \(.*nosuch"):
        filesystem("nosuch://x")


def test_a_library_that_is_not_there_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UserError, match=r"s3://b/x needs a library .*pip install 'svi-trainer\[remote\]'"):
        filesystem("s3://b/x")
