"""Where the configs lie, the nodes of them that are open, and a config composed from Python."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
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
