"""What a config may have made: names on a list, and defined where the list says, however they are reached.

Hydra calls whatever `_target_` names, so a config from elsewhere (a run folder, an experiment's yaml) could run any
function of any package. Names that the user types are the user's own affair; all others have to be on the list.
"""

import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra._internal.utils import _locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from trainer.errors import UserError, first_line, meant

LIST = (
    "trainer.models",
    *(f"trainer.inference.{name}" for name in ("guides", "objectives", "optim", "recipe.convergence")),
    *(f"trainer.inference.programs.{name}" for name in ("auto", "fused", "local_steps", "program")),
    "pyro.distributions",
    "pyro.infer.autoguide",
    "pyro.nn",
    "torch.optim",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
)


def refuse_others(cfg: DictConfig | ListConfig, allow: Sequence[str] = (), run: Path | None = None) -> None:
    """Raises UserError where ``cfg`` names what is neither on the list, nor below one of ``allow``, nor the user's own.

    The user's own is what a file below the current folder defines; not one in ``run``, a run folder, which may be
    somebody else's.
    """
    _reach_current_folder()
    for name in _targets(OmegaConf.to_container(cfg, resolve=True)):
        if not _may(name, allow, run):
            package = name.partition(".")[0]
            if _spec(package) is None:
                raise _absent(name, f"there is no package {package}")
            raise _refusal(name, name, run)
        home = _home(imported(name))
        if not _may(home, allow, run):
            raise _refusal(name, home, run)


def typed(overrides: Sequence[str]) -> list[str]:
    """The names that a command line gives: `model._target_=package.name`."""
    pairs = (each.lstrip("+").partition("=") for each in overrides)
    return [value.strip("'\"") for key, _, value in pairs if key.rpartition(".")[2] == "_target_"]


def imported(name: str) -> Any:
    """The class or function ``name``; the current folder is importable. Raises UserError where it is not there."""
    _reach_current_folder()
    try:
        return _locate(name)
    except Exception as error:
        raise _not_imported(name, error.__cause__ or error) from error


def _reach_current_folder() -> None:
    """Makes it importable: of an installed command it is not."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _not_imported(name: str, cause: BaseException) -> UserError:
    """What to fix: the name, the place of its module, or the module itself, whose import raises ``cause``."""
    above, _, last = name.rpartition(".")
    of_class = isinstance(cause, AttributeError) and cause.name == last and name.partition(".")[0] in sys.modules
    if of_class or (above in sys.modules and getattr(cause, "name", None) == name):
        hint = meant(last, dir(getattr(cause, "obj", None) if of_class else sys.modules[above]))
        return UserError(f"_target_={name}: {above} has no {last}{hint and f' ({hint})'}.")
    if not above or getattr(cause, "name", None) in (name.partition(".")[0], above):
        return _absent(name, first_line(cause))
    return UserError(f"_target_={name}: importing it raises {type(cause).__name__}: {first_line(cause)}")


def _absent(name: str, why: str) -> UserError:
    return UserError(
        f"_target_={name} cannot be imported ({why}): write it as module.name, with the module in this folder or "
        "installed."
    )


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if node.get("_target_") not in (None, "???"):
            yield str(node["_target_"])
        for each in node.values():
            yield from _targets(each)
    elif isinstance(node, list):
        for each in node:
            yield from _targets(each)


def _may(name: str, allow: Sequence[str], run: Path | None) -> bool:
    private = any(part.startswith("_") for part in name.split("."))
    return (_below(name, LIST) and not private) or _below(name, allow) or _is_own(name, run)


def _below(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _is_own(name: str, run: Path | None) -> bool:
    """Whether the package lies below the current folder, in neither an environment's packages nor ``run``."""
    package = name.partition(".")[0]
    if package == __package__.partition(".")[0]:  # in a checkout it lies there
        return False
    spec = _spec(package)
    places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
    files = [Path(place).resolve() for place in places if place]
    away = [Path(sys.prefix).resolve(), *([run.resolve()] if run else [])]
    return bool(files) and all(
        file.is_relative_to(Path.cwd().resolve())
        and file.exists()
        and "site-packages" not in file.parts
        and not any(file.is_relative_to(folder) for folder in away)
        for file in files
    )


def _spec(package: str) -> ModuleSpec | None:
    """Where a package lies, found without running it."""
    try:
        return find_spec(package)
    except (ImportError, ValueError):
        return None


def _home(found: Any) -> str:
    """Where a class or function is defined, whatever module it was reached through."""
    defined = found if hasattr(found, "__module__") and hasattr(found, "__qualname__") else type(found)
    return f"{defined.__module__}.{defined.__qualname__}"


def _refusal(name: str, home: str, run: Path | None) -> UserError:
    where = f"{run} names {name}" if run else f"the config names {name}"
    through = f" (which is {home})" if home != name else ""
    package = home.partition(".")[0]
    return UserError(
        f"{where}{through}, which is not on the list of what a config may have called: if you trust it, add "
        f"allow=[{package}]."
    )
