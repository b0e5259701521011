"""The command of the best run of a sweep, or of any runs of the same rows."""

import shlex
import sys
from pathlib import Path

from trainer.errors import UserError
from trainer.runs.folder import find

_OF_THE_SWEEP = ("trial=", "run_dir=", "sweep_dir=", "ckpt_path=last")


def print_best(folder: Path, storage: str | None, study: str | None) -> float:
    """Prints the command, alone on standard output, and returns the winner's ELBO per row.

    Of the runs below ``folder``, or of the ``study`` in ``storage``. Raises UserError where there is none.
    """
    if (storage is None) != (study is None):
        raise UserError("a study is found by both: storage=ADDRESS study=NAME.")
    words, value, place = _of_folder(folder) if storage is None else _of_study(storage, str(study))
    print(f"{place}: {value:.6g} nats per row", file=sys.stderr)
    print(shlex.join(["svi", "train", *(word for word in words if not word.startswith(_OF_THE_SWEEP))]))
    return value


def _of_folder(folder: Path) -> tuple[list[str], float, str]:
    runs = [(run.headline, run) for run in find(folder) if run.headline is not None and run.status == "done"]
    if not runs:
        raise UserError(f"no run at or below {folder} is done: svi runs dir={folder} shows them.")
    rows = sorted({(run.metrics.get("rows"), run.metrics.get("held_out_rows")) for _, run in runs}, key=str)
    if len(rows) > 1:
        said = " and ".join(f"{train} (held out {held_out})" for train, held_out in rows[:3])
        raise UserError(f"the runs below {folder} have different rows, {said}: their ELBOs cannot be compared.")
    value, best = max(runs, key=lambda pair: pair[0])
    return best.overrides, value, str(best.folder)


def _of_study(address: str, name: str) -> tuple[list[str], float, str]:
    from trainer.sweeps.study import absolute, best_of, open_storage  # Optuna, which folders do without

    trial = best_of(open_storage(absolute(address)), name)
    return list(trial.user_attrs["overrides"]), float(trial.value or 0.0), f"trial {trial.number} of {name}"
