"""Where a table's file lies: a path here, or an address that fsspec reaches."""

import glob
import gzip
from pathlib import Path, PurePosixPath
from typing import IO

from trainer.data.address import Place, filesystem, is_address


def suffix(place: object) -> str:
    """What the name ends in, in lower case; without the ".gz" of what is compressed."""
    name = PurePosixPath(str(place))
    return (name.with_suffix("") if is_compressed(name) else name).suffix.lower()


def is_compressed(place: object) -> bool:
    """Whether the name ends in ".gz"."""
    return str(place).lower().endswith(".gz")


def opened(place: Place) -> IO[bytes]:
    """The file's bytes, unpacked where its name ends in ".gz"; it can be read from any place on."""
    packed = is_compressed(place)
    if not is_address(place):
        return gzip.open(place, "rb") if packed else Path(place).open("rb")  # type: ignore[return-value]
    system, path = filesystem(str(place))
    stream: IO[bytes] = system.open(path, "rb", compression="gzip" if packed else None)
    return stream


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
