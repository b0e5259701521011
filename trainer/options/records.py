"""Records from the nodes of a config, and the sentence for an option that may not be what it is."""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from trainer.errors import UserError
from trainer.options.kinds import PartOf, Unfit, part_of, read, shown, words
from trainer.options.parts import RECORDS

Record = TypeVar("Record")


class Unknown(UserError):
    """A key names no option; ``key``: its full name."""

    def __init__(self, key: str):
        super().__init__(f"option {key} is unknown.")
        self.key = key


def bound(kind: Any, value: Any, key: str) -> Any:
    """``value`` as a ``kind``. Raises UserError with the option's name, the value and what it may be."""
    if value == "???":
        raise UserError(f"{key} is missing: give {key}=VALUE.")
    inner = [each for each in get_args(kind) if is_dataclass(each)] if get_origin(kind) in (Union, UnionType) else []
    if is_dataclass(kind) or (inner and value is not None):
        return record(inner[0] if inner else kind, value, key)  # type: ignore[arg-type]
    part = part_of(kind)
    if part is not None:
        return _part(part, value, key)
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return {str(name): bound(get_args(kind)[1], each, f"{key}.{name}") for name, each in value.items()}
    try:
        return read(kind, value)
    except Unfit as error:
        said = words(kind)
        more = f", {error}" if str(error) and "2**63" not in said else ""
        raise UserError(f"{key}={shown(value)} must be {said}{more}.") from None


def record(kind: type[Record], node: Any, key: str = "") -> Record:
    """The record of a node. Raises UserError for a key that is unknown, one that is missing, and a value that no option
    of the name may have.
    """
    if not isinstance(node, Mapping):
        below = ", ".join(f"{key}.{field.name}=" for field in fields(kind))  # type: ignore[arg-type]
        raise UserError(f"{key}={shown(node)} must have its options given one by one: {below}.")
    known, found, above = kinds_of(kind), {}, f"{key}." if key else ""
    for name, value in node.items():
        if name not in known:
            raise Unknown(f"{above}{name}")
        found[str(name)] = bound(known[str(name)], value, f"{above}{name}")
    for name in (name for name in known if name not in found):
        raise UserError(f"{above}{name} is missing: give {above}{name}=VALUE.")
    return kind(**found)


def kinds_of(kind: type) -> dict[str, Any]:
    """The kind of each option of a record."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def plain(value: Any) -> Any:
    """A record as dicts, lists and scalars."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, DictConfig):
        return OmegaConf.to_container(value)
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, tuple) else value


def _part(part: PartOf, value: Any, key: str) -> DictConfig:
    """The node, read-only, its options as those that are known may be."""
    if not isinstance(value, Mapping):
        raise UserError(
            f"{key}={shown(value)} must be a choice (svi VERB --help lists them), or have options below it."
        )
    if part.several:
        made = {name: each if each is None else _part(PartOf(), each, f"{key}.{name}") for name, each in value.items()}
    else:
        made = _typed(part.record, value, key)
    node = DictConfig(made, key=key)
    OmegaConf.set_readonly(node, True)
    return node


def _typed(fixed: type | None, value: Mapping[Any, Any], key: str) -> dict[Any, Any]:
    target, made = value.get("_target_"), dict(value)
    if not isinstance(target, str | NoneType):
        raise UserError(f"{key}._target_={shown(target)} must be the name of a class or function: package.name.")
    closed = RECORDS.get(str(target))
    needed = kinds_of(fixed) if fixed else {}
    kinds = {**(kinds_of(closed) if closed else {}), **needed}
    for name, each in value.items():
        if name in kinds:
            found = bound(kinds[name], each, f"{key}.{name}")
            made[name] = list(found) if isinstance(found, tuple) else found
        elif closed and not getattr(closed, "IS_OPEN", False) and not re.fullmatch("_.*_", str(name)):
            raise Unknown(f"{key}.{name}")
    for name in (name for name in needed if name not in value):
        raise UserError(f"{key}.{name} is missing: give {key}.{name}=VALUE.")
    return made
