"""`svi VERB key=value ...`: one Hydra program a verb."""

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from trainer.errors import RankLost, UserError, exit_code, meant
from trainer.options.allowed import typed
from trainer.options.config import config_folder, register_open_nodes
from trainer.options.entrance import check, options
from trainer.options.verbs import VERBS
from trainer.runs.folder import end_noted
from trainer.runs.secrets import handed_on, redact_files, redacted

Run = Callable[[Any, Path], float]
"""`run` of `trainer.verbs.NAME`: its record and the folder of its run, to the number that it returns."""
_FLAGS = {"--html": "html=runs.html"}
_MOVED = {"best": "svi runs DIR best=true"}
_SPELLINGS = {"standardise=": "standardize="}


def main(argv: list[str] | None = None) -> None:
    """Runs one verb. Exit codes: 0 done, 1 failed, 2 a mistake that the user can fix, 128 + n stopped by signal n."""
    arguments = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what its C++ says of lost connections is told better
    if len(arguments) == 2 and arguments[0] == "child":
        guarded("train", lambda: _child(Path(arguments[1])), debug=False)
        return
    if arguments == ["completion"]:
        print(import_module("trainer.options.completion").script(config_folder(), VERBS), end="")
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: svi VERB key=value ...\n")
        print("\n".join(f"  svi {verb:<8} {what}" for verb, (what, *_) in VERBS.items()))
        print('\nsvi VERB --help lists its options; eval "$(svi completion)" has the shell complete them.')
        return
    if arguments[0] not in VERBS:
        moved = _MOVED.get(arguments[0])
        hint = f"it is {moved} now" if moved else meant(arguments[0], VERBS)
        print(f"svi: {arguments[0]} is not a verb{hint and f' ({hint})'}: svi --help lists them.", file=sys.stderr)
        sys.exit(2)
    verb, *overrides = arguments
    if {"-h", "--help"} & set(overrides):
        print(import_module("trainer.options.help").text(config_folder(), verb, VERBS[verb].help, overrides), end="")
        return
    overrides = [_FLAGS.get(word, word) for word in overrides]
    for other, ours in _SPELLINGS.items():
        overrides = [ours + word.removeprefix(other) if word.startswith(other) else word for word in overrides]
    if VERBS[verb].bare and overrides and not re.search("^-|=", overrides[0]):
        overrides[0] = f"{VERBS[verb].bare}={overrides[0]}"
    if _rank():  # the others take the folder of rank 0
        overrides += ["hydra.run.dir=.", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    register_open_nodes()
    _check(verb, overrides)
    sys.argv = [f"svi {verb}", *overrides]
    hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=verb)(_task(verb))()


def _task(verb: str) -> Callable[[DictConfig], float]:
    def task(cfg: DictConfig) -> float:
        run: Run = import_module(f"trainer.verbs.{verb}").run
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        redact_files(Path(HydraConfig.get().sweep.dir))
        sys.argv = redacted(sys.argv)  # trackers note it

        def work() -> float:
            chosen = _with_typed(options(verb, cfg), HydraConfig.get().overrides.task)
            with end_noted(chosen, run_dir) if verb == "train" and _rank() == 0 else nullcontext():
                return run(chosen, run_dir)

        return guarded(verb, work, cfg.debug is True)

    return task


def _check(verb: str, words: list[str]) -> None:
    """Ends with a sentence where the words cannot be, before Hydra makes a folder; words for Hydra itself are its."""
    known, _ = get_args_parser().parse_known_args(words)
    if not any((known.help, known.hydra_help, known.cfg, known.info, known.shell_completion, known.config_dir)):
        guarded(verb, lambda: check(verb, known.overrides, known.multirun), "debug=true" in words)


def _with_typed(chosen: Any, words: Sequence[str]) -> Any:
    """The record with the names that the user typed allowed: what is typed is meant."""
    return replace(chosen, allow=(*chosen.allow, *typed(words))) if hasattr(chosen, "allow") else chosen


def _rank() -> int:
    """That of this process among those that a launcher made."""
    rank: int = import_module("trainer.distributed.launch").launched_rank()
    return rank


def _child(run_dir: Path) -> float:
    """A rank that Lightning launched: it starts from the run's saved config."""
    import_module("trainer.distributed.launch").die_with_parent()
    cfg = OmegaConf.load(run_dir / ".hydra" / "resolved.yaml")
    assert isinstance(cfg, DictConfig)
    run: Run = import_module("trainer.verbs.train").run
    return run(options("train", handed_on(cfg)), run_dir)


def guarded(verb: str, work: Callable[[], float], debug: bool) -> float:
    """What ``work`` returns. A mistake of the user's is one sentence: of the command, or of one job of a sweep."""
    try:
        return work()
    except (UserError, FloatingPointError, RankLost) as error:
        if debug:
            raise
        if _is_sweep():
            raise CompactHydraException(redacted(str(error))) from error
        if str(error):
            print(f"svi {verb}: {redacted(str(error))}", file=sys.stderr)
        sys.exit(exit_code(error))
    except OSError as error:
        if debug or _is_sweep() or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = error.filename or "a file"
        print(f"svi {verb}: {what} could not be written ({error.strerror}): free some space.", file=sys.stderr)
        sys.exit(2)


def _is_sweep() -> bool:
    """Whether this is a job that others follow, which an exit would end with it."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
