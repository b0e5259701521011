"""`svi completion`: what a shell completes after `svi`, as a script for it that asks nobody while one types.

eval "$(svi completion)"        # in .bashrc, or in .zshrc after compinit
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.options.config import node_of

_SCRIPT = """\
[ -n "${ZSH_VERSION-}" ] && autoload -Uz bashcompinit && bashcompinit
_svi() {
  local line=${COMP_LINE:0:COMP_POINT} words
  local current=${line##* } rest=${line#* }
  case $rest in
%(cases)s
    *" "*) words="" ;;
    *) words="%(verbs)s" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  case $current in
    *=*)
      [ ${#COMPREPLY[@]} = 0 ] && COMPREPLY=($(compgen -P "${current%%%%=*}=" -f -- "${current#*=}"))
      case ${COMP_WORDBREAKS-} in *=*) COMPREPLY=("${COMPREPLY[@]#"${current%%%%=*}="}") ;; esac
      ;;
  esac
  case ${COMPREPLY[*]-} in *=) compopt -o nospace 2>/dev/null ;; esac
}
complete -F _svi svi
"""


def script(conf: Path, verbs: Mapping[str, str]) -> str:
    """The script for Bash (and Zsh) that knows the verbs, their keys, and the choices of their groups in ``conf``."""
    cases = "\n".join(f'    "{verb} "*) words="{" ".join(sorted(words_of(conf, verb)))}" ;;' for verb in verbs)
    return _SCRIPT % {"cases": cases, "verbs": " ".join([*verbs, "completion"])}


def words_of(conf: Path, verb: str) -> set[str]:
    """`key=` of every key of a verb, and `group=choice` of every choice."""
    content: Any = OmegaConf.to_container(OmegaConf.load(conf / f"{verb}.yaml"), resolve=False)
    defaults = content.pop("defaults", [])
    content.pop("hydra", None)
    words = {f"{key}=" for key in _keys(content)} | {"--help"}
    groups = [name.removeprefix("override ") for each in defaults if isinstance(each, dict) for name in each]
    if verb == "train":
        words.add("-m")
        groups += [f"hydra/{path.name}" for path in (conf / "hydra").iterdir()]
    for group in groups:
        for path in (conf / group).glob("*.yaml"):
            words |= {f"{group}={path.stem}", *(f"{key}=" for key in _keys_of(path, group))}
    return words


def _keys_of(path: Path, group: str) -> Iterator[str]:
    """The keys of a choice of ``group``, below the node at which Hydra puts it."""
    node = node_of(path, group)
    content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    content.pop("defaults", None)
    yield from _keys(content, f"{node}." if node else "")


def _keys(content: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"
