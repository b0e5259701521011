"""A folder on a server or in a bucket: its files by ranges of bytes, through fsspec."""

from functools import cached_property
from typing import Any

from tenacity import Retrying, retry_if_not_exception_type, stop_after_attempt, wait_random_exponential

from trainer.data.address import filesystem
from trainer.errors import UserError

_ATTEMPTS = 5
_PAUSE, _LONGEST_PAUSE = 0.2, 10.0  # seconds, doubled at each attempt, and drawn from what lies below
_FINAL = (FileNotFoundError, PermissionError, UserError)  # another attempt would not help


class Store:
    """The files at ``url`` ("https://host/folder", "s3://bucket/folder", whatever fsspec reaches).

    ``timeout``: seconds in which a range of bytes has to come.
    """

    def __init__(self, url: str, timeout: float = 60.0):
        self.url, self.timeout = url.rstrip("/"), timeout

    def __truediv__(self, name: str) -> "Store":
        return Store(f"{self.url}/{name}", self.timeout)

    def read(self, name: str, first: int | None = None, last: int | None = None) -> bytes:
        """Bytes ``first`` to ``last`` (exclusive) of a file, or all of them; fewer where it ends before.

        Trouble on the way is tried again, with growing random pauses. Raises FileNotFoundError, and UserError when it
        does not go away, or the file may not be read.
        """
        path = f"{self._root}/{name}"
        attempts = Retrying(
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=_PAUSE, max=_LONGEST_PAUSE),
            retry=retry_if_not_exception_type(_FINAL),
            reraise=True,
        )
        try:
            return attempts(self._read, path, first, last)
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # every server and library has its own
            what = f"nothing came in {self.timeout:g} s" if _is_timeout(error) else _said(error)
            raise UserError(
                f"{self.url}/{name} cannot be read ({what}): try again when the server answers (ckpt_path=last goes "
                "on), or copy the folder to this machine."
            ) from error

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        try:
            self.read(name, 0, 1)
        except FileNotFoundError:
            return False
        return True

    def _read(self, path: str, first: int | None, last: int | None) -> bytes:
        system = self._system
        if not system.async_impl:
            whole: bytes = system.cat_file(path, start=first, end=last)
            return whole
        from fsspec.asyn import sync

        found: bytes = sync(system.loop, system._cat_file, path, start=first, end=last, timeout=self.timeout)
        if first is not None and last is not None and len(found) > last - first:
            if first:
                raise UserError(f"{self.url} gives whole files where a range was asked for: use another server.")
            found = found[:last]
        return found

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return filesystem(self.url)

    @property
    def _system(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]


def _is_timeout(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or "Timeout" in type(error).__name__


def _said(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
