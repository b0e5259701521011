"""Where a table's file lies: a path here, or an address that fsspec reaches."""

import glob
import gzip
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeAlias

from trainer.errors import UserError

Place: TypeAlias = Path | str
"""A path, or an address with "://" in it."""


def is_address(place: object) -> bool:
    """Whether ``place`` is on a server or in a bucket."""
    return "://" in str(place)


def suffix(place: object) -> str:
    """What the name ends in, in lower case; without the ".gz" of what is compressed."""
    name = PurePosixPath(str(place))
    return (name.with_suffix("") if name.suffix.lower() == ".gz" else name).suffix.lower()


def opened(place: Place) -> IO[bytes]:
    """The file's bytes, unpacked where its name ends in ".gz"; it can be read from any place on."""
    packed = str(place).lower().endswith(".gz")
    if not is_address(place):
        return gzip.open(place, "rb") if packed else Path(place).open("rb")  # type: ignore[return-value]
    system, path = filesystem(str(place))
    return system.open(path, "rb", compression="gzip" if packed else None)


def stamp(place: Place) -> object:
    """Another value when the file has changed, as far as can be told."""
    if not is_address(place):
        found = Path(place).stat()
        return found.st_mtime_ns, found.st_size
    system, path = filesystem(str(place))
    return system.info(path).get("size")


def files_at(pattern: str) -> tuple[Place, ...]:
    """The file at ``pattern``, or those that the glob matches, sorted; globs reach what can be listed."""
    if not is_address(pattern):
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        return tuple(Path(match) for match in matches if Path(match).is_file())
    if not glob.has_magic(pattern.partition("://")[2]) or pattern.startswith("http"):
        return (pattern,)
    system, path = filesystem(pattern)
    return tuple(system.unstrip_protocol(match) for match in sorted(system.glob(path)))


def filesystem(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it. Raises UserError for one that it cannot reach."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(address)
    except ImportError as error:
        raise UserError(
            f"{address} needs a library that is not installed ({error}): pip install 'svi-trainer[remote]'."
        ) from error
    except ValueError as error:
        raise UserError(f"cannot read '{address}': {error}; check how it begins.") from error
