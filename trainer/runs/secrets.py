"""Secrets stay out of what a run writes down: keys, tokens and passwords of a config, and those within addresses.

Ranks that start from the saved config are given them by the environment.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

HIDDEN = "***"
_KEY = re.compile(r"(^|[_.])(api_?key|access_key|secret|token|password|passwd|credentials?)s?($|_)", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]+(?=@)")
_LATER = re.compile(r",([\w.]+)=(.*?)(?=,[\w.]+=|$)")  # of settings in a row, as in Hydra's override_dirname
_VARIABLE = "SVI_SECRETS"


def redacted(value: Any, key: str = "") -> Any:
    """Plain ``value`` (dicts, lists, strings) without its secrets; `key=value` strings, several with commas
    between them too, are settings of that key.
    """
    if isinstance(value, dict):
        return {name: redacted(each, str(name)) for name, each in value.items()}
    if isinstance(value, list):
        return [redacted(each, key) for each in value]
    if value is not None and _KEY.search(key):
        return HIDDEN
    if not isinstance(value, str):
        return value
    name, equals, _ = value.partition("=")
    if equals and _KEY.search(name):
        return f"{name}={HIDDEN}"
    value = _LATER.sub(lambda found: f",{found[1]}={HIDDEN if _KEY.search(found[1]) else found[2]}", value)
    return _USER.sub(HIDDEN, value)


def hand_on(cfg: DictConfig) -> None:
    """Puts the config's secrets into the environment of the ranks that this process starts."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    os.environ[_VARIABLE] = json.dumps(dict(_differences(plain, redacted(plain))))


def handed_on(cfg: DictConfig) -> DictConfig:
    """A saved config with the secrets that the process that started this one has put into the environment."""
    for path, value in json.loads(os.environ.get(_VARIABLE, "{}")).items():
        OmegaConf.update(cfg, path, value)
    return cfg


def redact_files(folder: Path) -> None:
    """Rewrites the yaml files of ``folder`` (Hydra's own) that hold a secret."""
    for path in folder.glob("*.yaml"):
        plain = OmegaConf.to_container(OmegaConf.load(path))
        if redacted(plain) != plain:
            path.write_text(OmegaConf.to_yaml(OmegaConf.create(redacted(plain))))


def _differences(plain: Any, other: Any, path: str = "") -> Any:
    """(dotted path, value) of everything in ``plain`` that ``other`` has otherwise; a list counts as one value."""
    if isinstance(plain, dict):
        for name, value in plain.items():
            yield from _differences(value, other[name], f"{path}.{name}" if path else str(name))
    elif plain != other:
        yield path, plain
