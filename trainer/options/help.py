"""`svi VERB --help`: the choices and options of a verb, with the defaults and comments of conf/."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.options.config import node_of

_NOT_AN_OPTION = re.compile(
    r"(defaults|hydra):.*\n(?:(?: .*)?\n)*|# (?:@package|svi ).*\n|_target_: trainer\..*\n|\{\}\n"
)


def text(conf: Path, verb: str, what: str, words: Sequence[str] = ()) -> str:
    """What ``verb`` does, its choices, and its options; ``words`` (`optimizer=sgd`) choose whose are shown."""
    path = conf / f"{verb}.yaml"
    content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    groups = {name: choice for each in content["defaults"] if isinstance(each, dict) for name, choice in each.items()}
    chosen = {name: choice for name, choice in groups.items() if not name.startswith("override")}
    chosen |= {name: choice for name, _, choice in (word.partition("=") for word in words) if name in chosen}
    parts = [f"svi {verb}: {what}", f"usage: svi {verb} KEY=VALUE ..., a key below another as key.below=VALUE"]
    files = {name: sorted((conf / name).glob("*.yaml")) for name in sorted(chosen)}
    choices = [f"  {name}: {', '.join(path.stem for path in found)}" for name, found in files.items()]
    if any(len(found) > 1 for found in files.values()):
        parts.append("\n".join(["Choices, GROUP=CHOICE:", *choices]))
    parts += ["Options and their defaults (??? has to be given; null is chosen, or left out):", _options(path)]
    for name, choice in chosen.items():
        own = conf / name / f"{choice}.yaml"
        if own.is_file() and (said := _options(own)):
            node = node_of(own, name)
            parts.append(f"# {name}={choice}\n" + (f"{node}:\n{re.sub('^', '  ', said, flags=re.M)}" if node else said))
    return "\n\n".join(parts) + "\n"


def _options(path: Path) -> str:
    """The text of a file of conf/ from its first option on."""
    return re.sub(rf"^(?:{_NOT_AN_OPTION.pattern})", "", path.read_text(), flags=re.M).strip("\n")
