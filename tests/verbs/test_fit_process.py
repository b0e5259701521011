"""`fit` and a `Posterior` within somebody else's process: nothing there changes the answer or is changed."""

import asyncio
import multiprocessing
import os
import random
import threading
from contextlib import ExitStack

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hydra import compose, initialize_config_dir, version
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from trainer import Posterior, UserError, fit

QUICK = {"progress": False, "max_steps": 20, "options": {"program": "eager"}}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 2))
DATA = {"x": X, "y": X @ [1.0, 2.0] + RNG.normal(size=300)}


def model(x, y=None):
    """Makes tensors of its own, which take whatever the defaults are."""
    a = pyro.sample("a", dist.Normal(torch.tensor(0.0), torch.tensor(10.0)))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + x @ b, 1.0), obs=y)


def noisy(x, y=None):
    """Draws for itself what is no transformation of a normal, for which torch's generator is seeded."""
    m = pyro.sample("m", dist.Normal(0.0, 10.0)) + 0.0 * dist.Gamma(2.0, 2.0).sample()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def answers(posterior: Posterior, path) -> list[np.ndarray]:
    """What each public call gives."""
    posterior.save(path)
    loaded = Posterior.load(path, model)
    prediction = loaded.predict({"x": X[:3]}, num_draws=5)["y"]
    sites = [site.mean for site in posterior.summary()]
    return [posterior.theta.numpy(), *sites, *prediction, *posterior.sample(3).values()]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    return answers(fit(model, DATA, **QUICK), tmp_path_factory.mktemp("wanted") / "posterior.pt")


def defaults_of_a_notebook(stack: ExitStack) -> None:
    for restore, now in ((torch.set_default_dtype, torch.get_default_dtype()), (torch.set_default_device, None),
                         (torch.use_deterministic_algorithms, False)):  # fmt: skip
        stack.callback(restore, now)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(99), np.random.seed(99), random.seed(99)


def modes(stack: ExitStack) -> None:
    for mode in (torch.device("meta"), torch.inference_mode(), torch.autocast("cpu")):
        stack.enter_context(mode)


def handlers(stack: ExitStack) -> None:
    for handler in (pyro.plate("theirs", 3), poutine.trace(), pyro.validation_enabled(False), torch.no_grad()):
        stack.enter_context(handler)


@pytest.mark.parametrize("settings", [defaults_of_a_notebook, modes, handlers])
def test_no_setting_of_the_callers_changes_the_answer(settings, wanted, tmp_path):
    with ExitStack() as stack:
        settings(stack)
        found = answers(fit(model, DATA, **QUICK), tmp_path / "posterior.pt")
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_the_callers_streams_go_on_as_if_nothing_had_been_called(tmp_path):
    def drawn():
        return torch.randn(2).tolist(), np.random.normal(), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    alone = [drawn() for _ in range(3)]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    beside = [drawn()]
    posterior = fit(noisy, DATA, **QUICK)
    beside.append(drawn())
    answers_of = (posterior.summary, posterior.sample, lambda: posterior.predict(DATA, num_draws=3))
    for call in answers_of:
        call()
    beside.append(drawn())
    assert beside == alone


def test_parameters_of_a_guide_leave_no_trace():
    theirs = pyro.param("AutoNormal.locs.a", torch.tensor(3.0))
    try:
        before = dict(os.environ)
        fit(model, DATA, guide=AutoNormal, **QUICK)
        assert pyro.get_param_store().get_state()["params"].keys() == {"AutoNormal.locs.a"}
        assert pyro.param("AutoNormal.locs.a") is theirs
        assert dict(os.environ) == before
    finally:
        pyro.clear_param_store()


def test_within_a_program_of_hydras(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: 1")
    ConfigStore.instance().store(name="open_model", node={"theirs": 2})
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        fit(model, DATA, **QUICK)
        assert GlobalHydra.instance().is_initialized()
        assert version.getbase() == version.Version("1.2")
        assert compose("mine") == {"a": 1}
        assert compose("open_model") == {"theirs": 2}


def test_fits_in_several_threads_give_what_each_gives_alone(wanted):
    found = {}

    def work(number: int) -> None:
        found[number] = fit(model, DATA, **QUICK).theta.numpy()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(found[0], wanted[0])
    assert np.array_equal(found[1], wanted[0])


def test_within_a_running_event_loop(wanted):
    async def cell() -> Posterior:
        return fit(model, DATA, **QUICK)

    assert np.array_equal(asyncio.run(cell()).theta.numpy(), wanted[0])


def mean(y):
    m = pyro.sample("m", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def two_threads(many) -> list[float]:
    options = {**QUICK["options"], "threads": 2, "dtype": "float64"}
    return fit(mean, many, batch_size=40_000, **{**QUICK, "max_steps": 2, "options": options}).theta.tolist()


def in_the_fork(many, answer) -> None:
    answer.send(two_threads(many))


def test_a_fork_of_a_process_that_has_computed_with_two_threads():
    """Its OpenMP has lost a thread, for which two would wait for ever."""
    many = {"y": np.random.default_rng(1).normal(size=40_000)}
    found = two_threads(many)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=in_the_fork, args=(many, theirs))
    child.start()
    try:
        assert ours.poll(120)
        np.testing.assert_allclose(ours.recv(), found, rtol=1e-9)
    finally:
        child.kill()
        child.join()


def test_a_fork_of_a_process_that_has_used_a_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr("trainer.inference.isolation._is_fork", True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(UserError, match="fork of one that has used a GPU"):
        fit(mean, {"y": np.ones(10)}, **QUICK)
