"""Where the configs lie, the nodes of them that are open, and a config composed from Python."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf

from trainer.errors import UserError

_OPEN = ("columns", "model", "guide", "objective", "optimizer", "schedule", "program", "trainer", "logger")


def register_open_nodes() -> None:
    """Makes the nodes that take keys no default names: columns, and the arguments of users' own classes."""
    for name in _OPEN:
        node = {name: OmegaConf.create({}, flags={"struct": False})}
        ConfigStore.instance().store(name=f"open_{name}", node=node)


def config_folder() -> Path:
    """`conf/`: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent.parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def node_of(path: Path, group: str) -> str:
    """The node at which Hydra puts the file of a choice of ``group``; "" for the root."""
    said = re.match(r"# @package (\S+)", path.read_text())
    return {"_global_": ""}.get(said[1], said[1]) if said else group.replace("/", ".")


def composed(verb: str, chosen: Mapping[str, Any]) -> DictConfig:
    """The config of a verb with ``chosen`` values: groups by the name of a choice, keys by their dotted path.

    Raises UserError for a name that is neither.
    """
    with _hydra_kept():
        return _composed(verb, chosen)


@contextmanager
def _hydra_kept() -> Iterator[None]:
    """Leaves a Hydra program of the caller's as it was: what it has composed, its stored configs, its version base."""
    instances, stored = dict(Singleton._instances), _copied(ConfigStore.instance().repo)
    base = VersionBase.instance().getbase()
    Singleton._instances.pop(GlobalHydra, None)
    try:
        yield
    finally:
        ConfigStore.instance().repo = stored
        VersionBase.instance().version_base = base
        Singleton._instances.clear()
        Singleton._instances.update(instances)


def _copied(repo: dict[str, Any]) -> dict[str, Any]:
    return {name: _copied(node) if isinstance(node, dict) else node for name, node in repo.items()}


def _composed(verb: str, chosen: Mapping[str, Any]) -> DictConfig:
    register_open_nodes()
    folder = config_folder()
    groups = [f"{name}={value}" for name, value in chosen.items() if (folder / name).is_dir()]
    with initialize_config_dir(str(folder.absolute()), version_base="1.3"):
        try:
            cfg = compose(verb, overrides=groups)
        except Exception as error:
            raise UserError(f"the options cannot be used: {str(error).splitlines()[0]}") from error
    for name, value in chosen.items():
        if not (folder / name).is_dir():
            try:
                OmegaConf.update(cfg, name, value)
            except Exception as error:
                raise UserError(f"option {name}={value} is unknown: svi {verb} --help lists them.") from error
    return cfg
