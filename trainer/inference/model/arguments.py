"""The columns that a model or guide takes: the arguments of its signature, under whatever handlers are around it."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from pyro.poutine.messenger import Messenger, _bound_partial, _context_wrap

from trainer.errors import UserError, meant, shortened


def arguments(fn: Callable[..., Any], columns: Iterable[str], what: str = "model") -> tuple[str, ...]:
    """The columns that ``fn``, a model or ``what`` else, takes by name; an argument with a default that is not a column
    keeps its default.

    Raises UserError for a required argument that is not a column.
    """
    columns = tuple(columns)
    taken: list[str] = []
    for name, parameter in _parameters(fn).items():
        if parameter.kind is parameter.VAR_KEYWORD:
            return tuple(dict.fromkeys([*taken, *columns]))
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if name in columns:
            taken.append(name)
        elif parameter.default is parameter.empty:
            one_of_models = ", or have it return a guide (lambda model: AutoNormal(model))" if what == "guide" else ""
            hint = meant(name, columns)
            raise UserError(
                f'the {what} needs an argument "{name}" that is not a column of the data ({shortened(columns)}'
                f"{hint and f'; {hint}'}): "
                f"name its column with columns.{name}=..., or give it with {what}.{name}=... (in Python "
                f'columns={{"{name}": ...}}, or functools.partial){one_of_models}.'
            )
    return tuple(taken)


def left_at_default(fn: Callable[..., Any], columns: Iterable[str]) -> list[str]:
    """The arguments of ``fn`` with None for a default that are no columns."""
    found = _parameters(fn).values()
    return [each.name for each in found if each.default is None and each.name not in set(columns)]


def signature_of(fn: Callable[..., Any]) -> inspect.Signature:
    """That of ``fn`` under whatever handlers are around it; of a module, that of its ``forward``."""
    fn, _ = unwrapped(fn)
    return inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn)


def _parameters(fn: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Of its signature, by name."""
    return signature_of(fn).parameters


def unwrapped(fn: Any) -> tuple[Any, list[Messenger]]:
    """What handlers of `pyro.poutine` were put around, and these, the last one first."""
    handlers = []
    while isinstance(fn, _bound_partial) or (isinstance(fn, partial) and fn.func is _context_wrap):
        if isinstance(fn, _bound_partial):
            fn = fn.func
        else:
            handlers.append(fn.args[0])
            fn = fn.args[1]
    return fn, handlers
