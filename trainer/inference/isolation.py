"""The caller's process: a public call leaves it as it was, and what comes out does not depend on what was set in it.

Python, NumPy, torch and Pyro keep generators, modes and switches that belong to the whole process. `own_state` puts
them where our code expects them and puts them back; calls from several threads take turns, since they share most of it.
"""

import logging
import multiprocessing
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
import pyro
import torch
from pyro.poutine import runtime
from torch.utils import _device

from trainer.errors import UserError

Item = TypeVar("Item")
_SEEDS = 2**32  # of NumPy
_turn = threading.RLock()
_is_fork = False


def _note_fork() -> None:
    global _is_fork, _turn
    _is_fork, _turn = True, threading.RLock()  # whoever held the lock is not here


os.register_at_fork(after_in_child=_note_fork)


@contextmanager
def own_state(seed: int = 0) -> Iterator[None]:
    """A process as a fresh one is, with generators from ``seed``; afterwards it is as it was.

    Generators, default type and device, gradient, inference and autocast modes, deterministic and precision switches,
    threads, Pyro's parameters, settings and handlers, warning filters, loggers, the environment and the import path.
    Another thread that is in here is waited for. Raises UserError in a fork in which torch cannot work.
    """
    with _turn, ExitStack() as stack:
        for keep in (_function_modes, _generators, _switches, _threads, _pyro, _python):
            keep(stack.callback)
        stack.enter_context(pyro.get_param_store().scope(pyro.get_param_store().get_state()))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if is_fork():
            _refuse_dead_fork()
            torch.set_num_threads(1)
        random.seed(seed)
        np.random.seed(seed % _SEEDS)
        torch.manual_seed(seed)
        yield


def each_in_own_state(items: Iterator[Item]) -> Iterator[Item]:
    """``items``, each made in `own_state`; between two of them the process is the caller's."""
    while True:
        with own_state():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def is_fork() -> bool:
    """Whether this process is a fork, so that the threads of its parent's OpenMP are missing and waited for for ever:
    it has to compute with one thread.
    """
    of_a_pool = multiprocessing.parent_process() is not None and "__mp_main__" not in sys.modules
    return _is_fork or of_a_pool


def _refuse_dead_fork() -> None:
    alive = not torch.cuda._is_in_bad_fork()
    try:
        torch.ones((), requires_grad=True).backward()
    except RuntimeError:
        alive = False
    if not alive:
        raise UserError(
            "this process is a fork of one that has used a GPU, in which torch cannot work: start it by "
            'multiprocessing.get_context("spawn").'
        )


Later = Callable[..., Any]
"""Has a function called with its arguments at the end."""


def _function_modes(later: Later) -> None:
    """No default device (torch keeps it as a mode), nor another mode that changes what torch's functions do."""
    default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    later(_set_modes, _popped_modes(), default, _device.CURRENT_DEVICE)
    _set_modes([], None, None)


def _set_modes(modes: list[Any], default: Any, current: torch.device | None) -> None:
    _popped_modes()
    for mode in reversed(modes):
        torch._C._push_on_torch_function_stack(mode)
    torch._GLOBAL_DEVICE_CONTEXT.device_context = default
    _device.CURRENT_DEVICE = current


def _popped_modes() -> list[Any]:
    """The innermost one first."""
    return [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]


def _generators(later: Later) -> None:
    later(random.setstate, random.getstate())
    later(np.random.set_state, np.random.get_state())
    if torch.cuda.is_initialized():
        later(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    else:  # as it will be when it is first used
        later(torch.cuda.manual_seed_all, torch.initial_seed())
    later(torch.set_rng_state, torch.get_rng_state())


def _switches(later: Later) -> None:
    later(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float32)
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    later(torch.use_deterministic_algorithms, strict, warn_only=warns)
    torch.use_deterministic_algorithms(False)
    for name in ("benchmark", "deterministic"):
        later(setattr, torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
        setattr(torch.backends.cudnn, name, False)
    later(_set_precision, torch.get_float32_matmul_precision())
    _set_precision("highest")


def _set_precision(wanted: str) -> None:
    if torch.get_float32_matmul_precision() != wanted:
        torch.set_float32_matmul_precision(wanted)


def _threads(later: Later) -> None:
    later(torch.set_num_threads, torch.get_num_threads())


def _pyro(later: Later) -> None:
    """No handler of the caller's around the model."""
    later(lambda settings: pyro.settings.set(**settings), pyro.settings.get())
    for stack in (runtime._PYRO_STACK, runtime._DIM_ALLOCATOR._stack):
        later(stack.__setitem__, slice(None), stack[:])
        stack.clear()


def _python(later: Later) -> None:
    later(sys.path.__setitem__, slice(None), sys.path[:])
    later(_set_environment, dict(os.environ))
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            later(logger.__dict__.update, level=logger.level, propagate=logger.propagate, disabled=logger.disabled)
            later(logger.handlers.__setitem__, slice(None), logger.handlers[:])
    later(logging.root.manager._clear_cache)  # type: ignore[attr-defined]


def _set_environment(wanted: dict[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in wanted.items() if os.environ.get(name) != value})
