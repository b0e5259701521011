"""Addresses: what lies on a server or in a bucket, as fsspec reaches it."""

from pathlib import Path
from typing import Any, TypeAlias

from trainer.errors import UserError

Place: TypeAlias = Path | str
"""A path, or an address with "://" in it."""


def is_address(place: object) -> bool:
    """Whether ``place`` is on a server or in a bucket."""
    return "://" in str(place)


def filesystem(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it. Raises UserError for one that it cannot reach."""
    try:
        from fsspec.core import url_to_fs

        found: tuple[Any, str] = url_to_fs(address)
    except ImportError as error:
        raise UserError(
            f"{address} needs a library that is not installed ({error}): pip install 'svi-trainer[remote]'."
        ) from error
    except ValueError as error:
        raise UserError(f"{address} is not a readable address ({error}): check how it begins.") from error
    return found
