"""The Optuna study of a sweep: opened by several workers, each trial theirs for as long as they live.

One lock in the sweep folder makes opening, counting and asking exact. A worker holds a lock of its own, so that the
next one finds the trials of a worker that died and puts them back into the queue, to be continued in their run folders.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from trainer.errors import UserError, first_line
from trainer.options import build
from trainer.runs.lock import is_held, is_locked
from trainer.sweeps import search_space as space

_WORKER = "worker"


class Grid(optuna.samplers.GridSampler):
    """Every point of the grid once. Optuna's own ends `Study.optimize` after the last; here the sweep counts."""

    def after_trial(self, *args: Any) -> None:
        pass


def absolute(address: str) -> str:
    """The address of a storage, in a file or not, from wherever a job runs."""
    head, separator, path = address.partition(":///")
    if separator and head.startswith("sqlite") and path:
        return f"{head}:///{Path(path).absolute()}"
    return address if "://" in address else str(Path(address).absolute())


@lru_cache(maxsize=1)
def open_storage(address: str) -> BaseStorage:
    """A database at an address (``sqlite:///study.db``), or a journal file. Raises UserError naming it.

    Kept open: to open SQLite for each trial of a worker took a tenth of a second.
    """
    try:
        if "://" not in address:
            return JournalStorage(JournalFileBackend(address))
        return optuna.storages.RDBStorage(address)
    except Exception as error:
        raise UserError(f"the storage {address} cannot be opened: {first_line(error)}") from error


def best_of(storage: BaseStorage, name: str) -> FrozenTrial:
    """The best trial of a study. Raises UserError where there is none."""
    try:
        return optuna.load_study(storage=storage, study_name=name).best_trial
    except KeyError as error:
        names = ", ".join(each.study_name for each in storage.get_all_studies())
        raise UserError(f"the storage holds no study {name}, but {names or 'none at all'}.") from error
    except ValueError as error:
        raise UserError(f"no trial of study {name} is complete.") from error


class Search(NamedTuple):
    """What a study looks for, and how."""

    dimensions: space.Space
    sampler: DictConfig
    pruner: DictConfig
    command: list[str]
    """The words that every worker of the study must have been given."""


class Worker:
    """One process that takes trials of study ``name``, in the storage at ``address``."""

    def __init__(self, folder: Path, address: str, name: str, search: Search):
        dimensions, sampler, pruner, command = search
        self.folder, self.address, self.dimensions = folder, absolute(address), dimensions
        self.locks = folder / ".workers"
        self.locks.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self.storage = open_storage(self.address)
            self.study = optuna.create_study(
                storage=self.storage, study_name=name, direction="maximize", load_if_exists=True
            )
            attributes = self.study.user_attrs
            if attributes.get("command", command) != command:
                differ = sorted(set(attributes["command"]) ^ set(command))
                raise UserError(
                    f"study {name} was begun by another command ({', '.join(differ)}): give the same, or another "
                    "sweep_dir="
                )
            self.number = int(attributes.get("workers", 0))
            self.study.set_user_attr("command", command)
            self.study.set_user_attr("workers", self.number + 1)
            self.study.set_user_attr("pruner", OmegaConf.to_container(pruner, resolve=True))
            self.lock = FileLock(self._lock_of(self.number))
            self.lock.acquire(timeout=0)
        self.study.sampler = self._sampler(sampler)

    def _sampler(self, node: DictConfig) -> BaseSampler:
        """Workers of one seed draw differently, and so does a resumed search."""
        if node.get("seed") is not None:
            node = OmegaConf.merge(node, {"seed": int(node.seed) + self.number})  # type: ignore[assignment]
        factory = build.make(node, partial=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            made: BaseSampler = factory(space.points(self.dimensions)) if factory.func is Grid else factory()
            return made

    def ask(self, n_trials: int, at_once: int) -> list[optuna.Trial]:
        """Up to ``at_once`` trials, as many as the study still lacks to ``n_trials``; those waiting come first."""
        with self._alone():
            trials = self.study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state == TrialState.RUNNING and self._is_dead(trial):
                    self.give_back(trial.number)
            trials = self.study.get_trials(deepcopy=False)
            left = n_trials - sum(trial.state != TrialState.WAITING for trial in trials)
            asked = [self.study.ask(self.dimensions) for _ in range(min(at_once, left))]
            for each in asked:
                each.set_user_attr(_WORKER, self.number)
            return asked

    def give_back(self, number: int) -> None:
        """Puts a trial that did not end back into the queue."""
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)
        if not self.storage.get_trial(trial_id).state.is_finished():
            self.storage.set_trial_state_values(trial_id, TrialState.WAITING)

    @property
    def study_id(self) -> int:
        return self.storage.get_study_id_from_name(self.study.study_name)

    def complete(self, number: int, value: float) -> None:
        """Tells the value of a trial; one whose training a pruner ended is recorded so."""
        pruned = self.study.get_trials(deepcopy=False)[number].user_attrs.get("pruned")
        if pruned:
            self.study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self.study.tell(number, value, skip_if_finished=True)

    def fail(self, trial: optuna.Trial, why: str) -> None:
        trial.set_user_attr("failure", why)
        self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def leave(self) -> None:
        self.lock.release()
        self._lock_of(self.number).unlink(missing_ok=True)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Whether its worker is gone, and its training. Of workers with another sweep folder nothing is known."""
        lock = self._lock_of(int(trial.user_attrs.get(_WORKER, -1)))
        if trial.user_attrs.get(_WORKER) == self.number or not lock.exists() or is_held(lock):
            return False
        return not is_locked(self.folder / str(trial.number))

    def _lock_of(self, number: int) -> Path:
        return self.locks / f"{number}.lock"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with FileLock(self.locks / "study.lock"):
            yield
