"""Every trainable number as one flat vector: the guide's, the model's modules', and those of `pyro.param`.

`Parameters.capture` runs model and guide once on a batch and records what they own; afterwards `call` is a pure
substitution: modules are swapped with `torch.func.functional_call`, `pyro.param` sites answer from the vector.

Shapes: theta [P], unconstrained.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import pyro
import torch
from pyro.nn.module import PyroModule, _Context
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from trainer.errors import UserError
from trainer.inference.model.lazy_guides import OwnAttributes

_LOST = (
    'the module of parameter "{}" could not be found: make it once, outside the model, and pass it as the model, or '
    "register it in every call with pyro.module(...), with `import pyro`."
)
Found = TypeVar("Found")
Run = Callable[[], tuple[dict[str, Tensor], tuple[Any, ...]]]
_OF_MODULE = "$$$"  # Pyro's mark between a module's name and its parameter's in `pyro.module`


def _of_module(msg: Message[..., Any]) -> bool:
    """Whether a param message tells of a parameter that an nn.Module holds: nothing to store, it is swapped there."""
    return len(msg["args"]) > 1 and (_OF_MODULE in str(msg["name"]) or isinstance(msg["args"][1], nn.Parameter))


class Parameters:
    """Names, shapes and constraints of all that is trained, and the modules that own some of it."""

    def __init__(
        self, initial: dict[str, Tensor], modules: nn.ModuleDict, constrained: dict[str, Any], lazy: OwnAttributes
    ):
        self.initial, self.modules, self.constrained, self._lazy = initial, modules, constrained, lazy
        self.shapes = {name: tuple(value.shape) for name, value in initial.items()}
        ends = itertools.accumulate(map(math.prod, self.shapes.values()), initial=0)
        self.places = {name: slice(*span) for name, span in zip(self.shapes, itertools.pairwise(ends))}
        """Where each parameter lies in theta."""
        names = {id(value): name for name, value in modules.named_parameters()}
        self._written = {  # of a PyroParam: a module holds it by another name
            names[id(value)]: (names[id(value)].removesuffix("_unconstrained"), constraint)
            for module in modules.modules()
            if isinstance(module, PyroModule)
            for key, (constraint, _) in module._pyro_params.items()
            if (value := module._parameters.get(f"{key}_unconstrained")) is not None
        }
        # A module may be reached by several names, and a parameter stand in several modules.
        self._places = [
            (module._parameters, key, names[id(value)])
            for module in modules.modules()
            for key, value in module._parameters.items()
            if value is not None and names[id(value)] in initial
        ]

    @classmethod
    def capture(cls, run: Run) -> "Parameters":
        """Runs model and guide once on a batch and records the parameters that they touch.

        ``run()`` gives the guide's own flat parameters and the user's model (and guide), whose nn.Modules are found.
        """
        lazy = OwnAttributes()
        with _settings(), lazy.found():
            return cls._captured(run, lazy)

    @classmethod
    def _captured(cls, run: Run, lazy: OwnAttributes) -> "Parameters":
        modules = nn.ModuleDict()
        recorder = _Record()
        with _recording_modules(modules), modules_read() as owners, recorder:
            guide_params, callables = run()
        for fn, name in zip(callables, ("model", "guide")):
            _add_module(modules, fn, name)
        for ident in recorder.of_modules.values():
            if ident in owners and ident not in {id(value) for value in modules.parameters()}:
                _add_module(modules, owners[ident], type(owners[ident]).__name__)
        owned = {name: value.detach().clone() for name, value in modules.named_parameters() if value.requires_grad}
        known = {id(value) for value in modules.parameters()}
        for name, ident in recorder.of_modules.items():
            if ident not in known:
                raise UserError(_LOST.format(name))
        return cls({**guide_params, **owned, **recorder.initial}, modules, recorder.constraints, lazy)

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def flatten(self, values: dict[str, Tensor]) -> Tensor:
        """theta [P] from {name: unconstrained tensor}."""
        return torch.cat([values[name].reshape(-1) for name in self.shapes])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """{name: view of theta [P] in its unconstrained shape}."""
        pieces = theta.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces)}

    def call(self, values: dict[str, Tensor], fn: Callable[[dict[str, Tensor]], Found]) -> Found:
        """``fn(values)`` with every module and every `pyro.param` holding ``values`` for the time of the call."""
        before = [held[key] for held, key, _ in self._places]
        try:
            for held, key, name in self._places:
                held[key] = values[name]  # type: ignore[assignment]
            with (
                _settings(),
                self._lazy.in_place(),
                _module_statement(_known_module),
                _Answer(values, self.constrained),
            ):
                return fn(values)
        finally:
            for (held, key, _), value in zip(self._places, before):
                held[key] = value

    def constrain(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values as the model sees them, under the names that it has for them."""
        made = {}
        for name, value in values.items():
            written, constraint = self._written.get(name, (name, self.constrained.get(name)))
            made[written] = value if constraint is None else transform_to(constraint)(value)
        return made


@contextmanager
def _settings() -> Iterator[None]:
    if not hasattr(_Context, "param_state"):
        _Context.param_state = _NoState()  # type: ignore[assignment]
    with pyro.settings.context(module_local_params=True):
        yield


class _NoState:
    """The parameters that a PyroModule's context holds, for one made before `module_local_params` was on."""

    def __get__(self, context: Any, owner: Any = None) -> dict[str, Any]:
        return {"params": {}, "constraints": {}}


@contextmanager
def modules_read() -> Iterator[dict[int, PyroModule]]:
    """{id of a parameter: the outermost PyroModule through which it was read} in the time of the context.

    So an autoguide is found that a guide calls, which need not register it.
    """
    owners: dict[int, PyroModule] = {}
    original = PyroModule.__getattr__

    def noting(module: PyroModule, name: str) -> Any:
        for parameter in module.parameters() if "_parameters" in vars(module) else ():
            owners.setdefault(id(parameter), module)
        return original(module, name)

    PyroModule.__getattr__ = noting  # type: ignore[method-assign]
    try:
        yield owners
    finally:
        PyroModule.__getattr__ = original  # type: ignore[method-assign]


def _add_module(modules: nn.ModuleDict, fn: Any, name: str) -> None:
    """Adds the nn.Module of a callable: itself, the object of a bound method, or what a partial or a poutine wraps."""
    if isinstance(fn, nn.Module):
        known = {id(module) for module in modules.modules()}
        if id(fn) not in known:
            modules[name if name not in modules else f"{name}_{len(modules)}"] = fn
    elif inspect.ismethod(fn):
        _add_module(modules, fn.__self__, name)
    elif isinstance(fn, functools.partial):  # a poutine around a model is one too
        for inner in (fn.func, *fn.args, *fn.keywords.values()):
            _add_module(modules, inner, name)


@contextmanager
def _module_statement(statement: Callable[..., nn.Module]) -> Iterator[None]:
    """`pyro.module` is ``statement`` for the time of the context."""
    original = pyro.module
    with ExitStack() as stack:
        for place in (pyro, pyro.primitives):
            stack.callback(setattr, place, "module", original)
            setattr(place, "module", statement)  # noqa: B010 (mypy knows these as functions)
        yield


def _recording_modules(modules: nn.ModuleDict) -> AbstractContextManager[None]:
    original = pyro.module

    def module(name: str, nn_module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        _add_module(modules, nn_module, name.replace(".", "_"))
        return original(name, nn_module, *args, **kwargs)

    return _module_statement(module)


def _known_module(name: str, nn_module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:  # noqa: ARG001  Pyro's
    """`pyro.module` for a module that is swapped already (Pyro's own warns of tensors that want no gradient)."""
    return nn_module


class _Record(Messenger):
    """Notes each `pyro.param` site: its constraint and its first unconstrained value."""

    def __init__(self) -> None:
        super().__init__()
        self.initial: dict[str, Tensor] = {}
        self.constraints: dict[str, Any] = {}
        self.of_modules: dict[str, int] = {}

    def _pyro_param(self, msg: Message[..., Any]) -> None:
        name = str(msg["name"])
        if _of_module(msg):
            msg["value"], msg["done"] = msg["args"][1], True
            self.of_modules[name] = id(msg["args"][1])
            return
        if name not in self.initial:
            if len(msg["args"]) < 2:  # a module's own attribute, found with its module
                return
            value = msg["args"][1]
            value = value() if callable(value) else value
            constraint = msg["kwargs"].get("constraint") or constraints.real
            self.constraints[name] = constraint
            self.initial[name] = transform_to(constraint).inv(value.detach()).clone()
        msg["value"], msg["done"] = transform_to(self.constraints[name])(self.initial[name]), True

    def _pyro_post_param(self, msg: Message[..., Any]) -> None:
        """Notes the PyroParam attributes of modules."""
        unconstrained = getattr(msg["value"], "unconstrained", None)
        if len(msg["args"]) < 2 and unconstrained is not None:
            self.of_modules[str(msg["name"])] = id(unconstrained())


class _Answer(Messenger):
    """Answers `pyro.param` sites from ``values``."""

    def __init__(self, values: dict[str, Tensor], constrained: dict[str, Any]):
        super().__init__()
        self.values, self.constrained = values, constrained

    def _pyro_param(self, msg: Message[..., Any]) -> None:
        name = str(msg["name"])
        if _of_module(msg):  # swapped in its module already
            value = _swapped(name, msg["args"][1])
        elif name in self.constrained:
            value = transform_to(self.constrained[name])(self.values[name])
        elif len(msg["args"]) < 2:  # a module's own attribute, swapped in its module already
            return
        else:
            raise UserError(f'pyro.param("{name}") appears only after the first batch: declare it on every call.')
        msg["value"], msg["done"] = value, True

    def _pyro_post_param(self, msg: Message[..., Any]) -> None:
        unconstrained = getattr(msg["value"], "unconstrained", None)
        if len(msg["args"]) < 2 and unconstrained is not None:
            _swapped(str(msg["name"]), unconstrained())


def _swapped(name: str, value: Any) -> Any:
    """``value``, which the module of parameter ``name`` holds. Raises UserError where it is not the trained one."""
    if isinstance(value, nn.Parameter) and value.requires_grad:  # of a module that is made anew in every call
        raise UserError(_LOST.format(name))
    return value
