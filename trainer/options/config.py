"""Where the configs lie, and the nodes of them that are open."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.version import VersionBase
from omegaconf import OmegaConf

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


@contextmanager
def hydra_kept() -> Iterator[None]:
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
