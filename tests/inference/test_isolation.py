"""`own_state`: whatever a call sets is set back, and whatever the caller has set is not seen inside."""

import logging
import os
import random
import sys
import threading
import warnings
from contextlib import ExitStack

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine import runtime

from trainer.inference import isolation as process
from trainer.inference.isolation import each_in_own_state, own_state


def seen() -> dict[str, object]:
    """All that is the process's, as plain values."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "device": torch.get_default_device(),
        "modes": torch._C._len_torch_function_stack(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "settings": pyro.settings.get(),
        "handlers": list(runtime._PYRO_STACK),
        "dims": list(runtime._DIM_ALLOCATOR._stack),
        "parameters": {name: id(value) for name, value in pyro.get_param_store().get_state()["params"].items()},
        "filters": list(warnings.filters),
        "loggers": [(logging.getLogger(n).level, list(logging.getLogger(n).handlers)) for n in (None, "some.where")],
        "enabled": logging.getLogger("some.where").isEnabledFor(logging.INFO),
        "environment": dict(os.environ),
        "path": list(sys.path),
    }


def disturb() -> None:
    """Sets everything to something else, by the means of those who set it."""
    torch.randn(3), np.random.random(3), random.random()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, True
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(torch.get_num_threads() + 1)
    pyro.enable_validation(not pyro.settings.get("validate_poutine"))
    pyro.settings.set(cholesky_relative_jitter=3.0)
    pyro.get_param_store()["mine"] = torch.ones(2, device="cpu")
    warnings.simplefilter("ignore")
    logging.getLogger("some.where").setLevel(logging.ERROR)
    logging.getLogger().addHandler(logging.NullHandler())
    os.environ["SOME_WHERE"] = "else"
    os.environ.pop("SOME_OTHER", None)
    sys.path.insert(0, "somewhere")


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.setenv("SOME_OTHER", "1")
    logging.getLogger("some.where").setLevel(logging.DEBUG)
    with own_state():  # what these tests set themselves
        yield
        torch.set_default_device(None)


@pytest.mark.usefixtures("clean")
def test_whatever_is_set_inside_is_set_back():
    pyro.get_param_store()["theirs"] = torch.zeros(2)
    before = seen()
    with own_state():
        disturb()
        untouched = {"inference", "autocast", "handlers", "dims"}
        assert all(seen()[name] != before[name] for name in before.keys() - untouched)
    assert seen() == before


@own_state()
def broken() -> None:
    disturb()
    raise ZeroDivisionError


@pytest.mark.usefixtures("clean")
def test_also_after_an_error():
    before = seen()
    with pytest.raises(ZeroDivisionError):
        broken()
    assert seen() == before


def caller_with_everything_set(stack: ExitStack) -> None:
    disturb()
    stack.enter_context(torch.inference_mode())
    stack.enter_context(torch.autocast("cpu"))
    stack.enter_context(torch.device("meta"))
    stack.enter_context(poutine.block())
    stack.enter_context(pyro.plate("theirs", 3))


@pytest.mark.usefixtures("clean")
def test_what_the_caller_has_set_is_not_seen_inside():
    kept = {"threads", "settings", "parameters", "filters", "loggers", "enabled", "environment", "path"}
    with own_state(7):
        wanted = {name: value for name, value in seen().items() if name not in kept}
        drawn = torch.randn(2).tolist(), np.random.random(), random.random()
        learnt = torch.ones(2, requires_grad=True)
    with ExitStack() as stack:
        caller_with_everything_set(stack)
        before = seen()
        with own_state(7):
            assert {name: value for name, value in seen().items() if name not in kept} == wanted
            assert (torch.randn(2).tolist(), np.random.random(), random.random()) == drawn
            (learnt * torch.ones(2)).sum().backward()
            assert pyro.sample("x", dist.Normal(0.0, 1.0)).shape == ()
        assert seen() == before


@pytest.mark.usefixtures("clean")
def test_between_two_items_the_process_is_the_callers():
    def items():
        for _ in range(2):
            yield torch.get_default_dtype(), torch.randn(1).item()

    torch.set_default_dtype(torch.float64)
    before, found = seen(), []
    for item in each_in_own_state(items()):
        assert seen() == before
        found.append(item)
    with own_state():
        assert found == [(torch.float32, torch.randn(1).item())] * 2


def test_threads_take_turns():
    inside, order = threading.Event(), []

    def other() -> None:
        inside.wait()
        with own_state():
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    with own_state():
        inside.set()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


@pytest.mark.usefixtures("clean")
def test_a_fork_computes_with_one_thread_and_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(process, "_is_fork", True)
    torch.set_num_threads(3)
    with own_state():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
