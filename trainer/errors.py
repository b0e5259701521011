"""The errors that a user is meant to see, and the exit codes they come with."""

import signal
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake that the user can fix: one sentence that names the thing and the remedy.

    The command line prints the sentence alone and exits with code 2 (`debug=true` adds the traceback).
    """


class CorruptDataError(UserError):
    """Data that is not, or no longer, what its index says: missing, cut short, unreadable or changed.

    Not data that cannot be reached: it may be intact.
    """


class RankLost(Exception):
    """Another rank has left, so this one does, with exit code ``code``; without text: the other tells of it.

    ``faultless``: nothing speaks against the state of this rank.
    """

    def __init__(self, text: str, code: int = 1, faultless: bool = True):
        super().__init__(text)
        self.code, self.faultless = code, faultless


class Stopped(SystemExit):
    """Ends a process that was told to by signal ``number``, with exit code 128 + ``number``.

    ``agreed``: on all ranks.
    """

    def __init__(self, number: int, agreed: bool = False):
        super().__init__(128 + number)
        self.number, self.agreed = number, agreed
        self.step: int | None = None
        """Where training had come to, if it had begun."""

    def __str__(self) -> str:
        where = "before training" if self.step is None else f"at step {self.step:,}"
        return f"stopped by {signal.Signals(self.number).name} {where}; continue with ckpt_path=last"


def exit_code(error: BaseException) -> int:
    """Of the command that ends with ``error``."""
    if isinstance(error, RankLost):
        return error.code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 2 if isinstance(error, UserError) else 1


def counted(number: int, one: str, many: str = "") -> str:
    """Count ``number`` of what is called ``one``: "1 block", "2,000 blocks"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def shortened(names: Iterable[str], most: int = 20) -> str:
    """``names`` in a row, the first ``most`` of them where there are more."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def meant(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Ask "do you mean NAME?", the nearest to ``name`` of the ``known`` ones; ``otherwise`` where none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f"do you mean {near[0]}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """Of what an error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
