"""Autoguides as objects: what they make of themselves in their first call belongs to the run, not to the object.

For the time of a call such an object, wherever it stands (in a closure, a list, another module), has attributes of the
run's own: parameters, prototype, plates. Between calls it has those that its owner knows, so that the next run starts
as this one did.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.nn import PyroModule
from pyro.nn.module import _Context
from pyro.poutine.guide import GuideMessenger

KINDS = (AutoGuide, GuideMessenger, EasyGuide)
_ENTRANCES = ((PyroModule, "__call__"), (AutoMessenger, "__call__"), (AutoGuide, "_setup_prototype"))


class OwnAttributes:
    """The autoguides that a run has called, each with the attributes that are the run's."""

    def __init__(self) -> None:
        self._owned: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._contexts: dict[int, _Context] = {}

    @contextmanager
    def found(self) -> Iterator[None]:
        """Every autoguide that is called in this context gets attributes of the run's until its end."""
        with ExitStack() as stack:
            for kind, name in _ENTRANCES:
                stack.callback(setattr, kind, name, getattr(kind, name))
                setattr(kind, name, self._entrance(getattr(kind, name), stack))
            yield

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The autoguides have the run's attributes in this context."""
        with ExitStack() as stack:
            for module, own in self._owned.values():
                _lend(module, own, stack)
            yield

    def _entrance(self, original: Callable[..., Any], stack: ExitStack) -> Callable[..., Any]:
        def entered(module: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(module, KINDS) and id(module) not in self._owned:
                self._own(module, stack)
            return original(module, *args, **kwargs)

        return entered

    def _own(self, module: Any, stack: ExitStack) -> None:
        parts = [part for part in module.modules() if isinstance(part, PyroModule)]
        for part in (module, *parts) if module not in parts else parts:
            if id(part) not in self._owned:
                own = {name: copy.copy(each) if isinstance(each, dict) else each for name, each in vars(part).items()}
                if "_pyro_context" in own:  # one that its modules share
                    own["_pyro_context"] = self._contexts.setdefault(id(own["_pyro_context"]), _Context())
                self._owned[id(part)] = (part, own)
                _lend(part, own, stack)


def _lend(module: Any, own: dict[str, Any], stack: ExitStack) -> None:
    stack.callback(object.__setattr__, module, "__dict__", vars(module))
    object.__setattr__(module, "__dict__", own)
