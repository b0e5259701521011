"""The two ways in, the words of a command and the options of a call, each to the record of a verb or one sentence."""

import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from os import PathLike, fspath
from threading import Lock
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import UnsupportedValueType

from trainer.errors import UserError, first_line, meant
from trainer.options import verbs
from trainer.options.completion import words_of
from trainer.options.config import config_folder, hydra_kept, register_open_nodes
from trainer.options.kinds import Part, shown
from trainer.options.records import Unknown, bound, plain, record

_ALONE = Lock()  # Hydra composes with what is global to the process


def options(verb: str, cfg: DictConfig, **instead: Any) -> Any:
    """The record of a verb from its composed config; ``instead``: values of the top level in place of the config's.

    What loggers write goes below the run's folder, so that node keeps its interpolations.
    Raises UserError for the first option that cannot be.
    """
    content: dict[str, Any] = OmegaConf.to_container(OmegaConf.merge(cfg, instead), resolve=True)  # type: ignore
    if "logger" in content:
        content["logger"] = OmegaConf.to_container(cfg.logger)
    return _told(verb, content)


def option(kind: Any, value: Any, name: str) -> Any:
    """An argument of a call as a ``kind``. Raises UserError as for an option."""
    return bound(kind, _plain_value(value), name)


def resolved(record: Any) -> DictConfig:
    """A record as a config again, to be written down."""
    return OmegaConf.create(OmegaConf.to_container(OmegaConf.create(plain(record)), resolve=True))  # type: ignore


def of_call(verb: str, chosen: Mapping[str, Any]) -> Any:
    """The record of a verb with ``chosen`` values: groups by the name of a choice, keys by their dotted path.

    Raises UserError for a name that is neither, and a value that an option cannot have.
    """
    values = {str(name): _plain_value(value) for name, value in chosen.items()}
    groups = {name for name, value in values.items() if isinstance(value, str) and _is_group(name)}
    cfg = composed(verb, [f"{name}={values[name]}" for name in groups])
    strange: dict[str, Exception] = {}
    for name in (name for name in values if name not in groups):
        try:
            OmegaConf.update(cfg, name, values[name])
        except UnsupportedValueType as error:
            OmegaConf.update(cfg, name, shown(values[name]))
            strange[name] = error
        except Exception as error:
            raise _unknown(verb, name) from error
    made = options(verb, cfg)  # says what a strange value may be, unless that is any text
    for name, cause in strange.items():
        raise UserError(f"{name}={shown(values[name])} must be text.") from cause
    return made


def check(verb: str, words: Sequence[str], sweep: bool = False) -> float:
    """0, the exit code. Raises UserError for the words of a command that cannot be, before anything is done for it.

    Those of a sweep are judged by each value that it is to try.
    """
    parsed = [_parsed(verb, word) for word in words]
    for each in parsed:
        if each.is_sweep_override() and not sweep:
            key, value = each.key_or_group, str(each.input_line).partition("=")[2]
            raise UserError(f"{key}={value} is several values: write {key}=[{value}] for a list; -m tries one by one.")
    first = [f"{each.key_or_group}={next(_tried(each))}" if each.is_sweep_override() else word
             for each, word in zip(parsed, words, strict=True)]  # fmt: skip
    hydra = any(word.lstrip("+~").startswith("hydra") for word in words)
    cfg = composed(verb, first, hydra)
    for part in ("sweeper", "launcher") if hydra else ():
        try:
            bound(Part, OmegaConf.to_container(cfg.hydra[part]), f"hydra.{part}")
        except Unknown as error:
            raise _unknown(verb, error.key) from None
    if hydra:
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
    options(verb, cfg)
    for each in parsed:
        if each.is_sweep_override() and not _is_group(each.key_or_group):
            for value in _tried(each):
                OmegaConf.update(changed := cfg.copy(), each.key_or_group, value)
                options(verb, changed)
    return 0


def composed(verb: str, words: Sequence[str], hydra: bool = False) -> DictConfig:
    """The config of a verb. Raises UserError for words that name nothing that there is."""
    try:
        with _ALONE, hydra_kept():
            register_open_nodes()
            with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
                return compose(verb, list(words), return_hydra_config=hydra)
    except Exception as error:
        raise _sentence(verb, words, error) from None


def _told(verb: str, content: dict[str, Any]) -> Any:
    try:
        return record(verbs.VERBS[verb].record, content)
    except Unknown as error:
        raise _unknown(verb, error.key) from None


def _unknown(verb: str, key: str) -> UserError:
    same_end = [name for name in _names(verb) if name.rpartition(".")[2] == key.rpartition(".")[2]]
    hint = meant(key, _names(verb), f"do you mean {same_end[0]}?" if same_end else "")
    return UserError(f"option {key} is unknown{hint and f' ({hint})'}: svi {verb} --help lists them.")


def _names(verb: str) -> list[str]:
    """Every key and group of a verb, by conf/."""
    return sorted({word.partition("=")[0] for word in words_of(config_folder(), verb) if "=" in word})


def _is_group(name: str) -> bool:
    return name != "" and (config_folder() / name).is_dir()


def _sentence(verb: str, words: Sequence[str], error: Exception) -> UserError:
    """What Hydra says of words that it cannot compose, in one sentence."""
    for word in words:
        key, value = word.lstrip("+~").split("=", 1)[0], _parsed(verb, word).value()
        if _is_group(key) and not isinstance(value, str | list):
            return _no_choice(key, shown(value), [path.stem for path in (config_folder() / key).glob("*.yaml")])
    said = str(error)
    absent = re.search(r"Could not find '(.+)/(.+?)'", said)
    if absent:
        return _no_choice(absent[1], absent[2], re.findall(r"^\t(\w+)$", said, re.MULTILINE))
    unknown = re.search(r"Could not override '(.+?)'|Key '(.+?)' is not in struct|append to the config.*'(.+?)'", said)
    if unknown:
        return _unknown(verb, next(filter(None, unknown.groups())).partition("@")[0])
    return UserError(f"the options cannot be used: {first_line(error)}")


def _no_choice(group: str, value: str, choices: Sequence[str]) -> UserError:
    *others, last = sorted(choices) or [""]
    if "." in value and not value.replace(".", "").isdigit():  # a function where the name of a choice belongs
        return UserError(f"{group}={value} is unknown: a class or function of your own is {group}._target_={value}.")
    return UserError(f"{group}={value} is unknown: write {' or '.join(filter(None, [', '.join(others), last]))}.")


def _parsed(verb: str, word: str) -> Override:
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except OverrideParseException:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word} is not an option: write KEY=VALUE (svi {verb} --help lists the keys).") from None
        raise UserError(f"{key}={value} cannot be read: put the value in quotes, '{key}=\"...\"'.") from None


def _tried(swept: Override) -> Iterator[Any]:
    """Values that a sweep may try: all of a choice, the first of a range, the ends of an interval."""
    value: Any = swept.value()
    if isinstance(value, ChoiceSweep):
        yield from (getattr(each, "text", each) for each in value.list)
    elif isinstance(value, RangeSweep):
        yield value.start
    elif isinstance(value, IntervalSweep):
        yield from (value.start, value.end)
    else:
        yield next(swept.sweep_iterator())


def _plain_value(value: Any) -> Any:
    """A value of Python's or NumPy's as a config holds it; others as they are."""
    if isinstance(value, Mapping):
        return {str(name): _plain_value(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain_value(each) for each in value]
    if isinstance(value, Enum):
        return _plain_value(value.value) if isinstance(value.value, str | int | float) else value.name
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, type):
        return value.__name__
    if type(value).__name__.lower().endswith("dtype"):  # torch.float64 and np.dtype("float64")
        return str(value).removeprefix("torch.")
    return _plain_value(value.tolist()) if callable(getattr(value, "tolist", None)) else value
