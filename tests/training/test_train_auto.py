"""`program=auto` in a run: the switch, on both sides of which a run may be cut; chunks whose size follows its speed."""

import os
import signal

import pytest
import torch
from app_tools import final_state

from trainer.engine import checkpoint
from trainer.engine import module as lit_module
from trainer.errors import Stopped
from trainer.inference.programs import auto
from trainer.inference.programs.program import Eager
from trainer.inference.programs.tracing import Untraceable
from trainer.training import budget, newton_steps

RUN = ("program=auto", "recipe=plain", "rounds=2", "max_steps=90", "stop=budget")
SWITCH = 30  # the end of the first of two rounds


class Compiled(Eager):
    """In place of `Fused`: steps of other noise, so that it shows which program took them."""

    calls: list[tuple[str, int]] = []  # noqa: RUF012

    def __init__(self, inference, update, seed, *others):
        super().__init__(inference, update, seed + 1, *others)

    def begin(self, state, chunk, say=print):
        self.calls.append(("begin", int(state.step)))

    def prepare(self, state, chunk, say=print):
        self.calls.append(("prepare", int(state.step)))

    def run(self, state, chunk, steps):
        self.calls.append(("run", int(state.step)))
        return super().run(state, chunk, steps)

    def abandon(self):
        self.calls.append(("abandon", -1))


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    """Rounds of 12 steps (an epoch) may be; twenty steps are worth a compiler."""
    monkeypatch.setattr(budget, "_ROUND_STEPS", 12)
    monkeypatch.setattr(auto, "WORTH", 20)
    monkeypatch.setattr(auto, "Fused", Compiled)
    monkeypatch.setattr(Compiled, "calls", [])


def test_a_run_that_is_cut_on_either_side_of_the_switch_is_the_same(fit, tmp_path):
    """Before it, at it, and after it; with chunks of any number of slots."""
    whole = fit(
        *RUN, "checkpoint.every_n_steps=10", "checkpoint.keep_last=20", "slots=null", run_dir=tmp_path / "whole"
    )
    steps = [step for name, step in Compiled.calls if name == "run"]
    assert Compiled.calls[0] == ("begin", 0)
    assert ("prepare", SWITCH) in Compiled.calls
    assert Compiled.calls[-1] == ("abandon", -1)
    assert min(steps) == SWITCH
    saved = {int(checkpoint.load(path)[0].step): path for path in (whole / "checkpoints").glob("*.ckpt")}
    want = final_state(whole)[0].theta
    for step in (20, SWITCH, 50):
        Compiled.calls.clear()
        again = fit(*RUN, f"ckpt_path={saved[step]}", "slots=7", run_dir=tmp_path / f"from-{step}")
        assert Compiled.calls[0] == ("begin" if step < SWITCH else "prepare", step)
        assert [name for name, _ in Compiled.calls].count("prepare") == 1
        assert torch.equal(final_state(again)[0].theta, want)


def test_a_run_that_ends_in_its_first_round_waits_for_no_compiler(fit, monkeypatch):
    monkeypatch.setattr(newton_steps, "falls_at", lambda *_: torch.zeros(0, 1))  # so early it is no optimum
    ends = "averaging=0.9", "stop=converged", *(f"stop.{name}=1e9" for name in ("mc_error", "scale_error", "rhat"))
    run_dir = fit(*RUN, *ends, "stop.gradient=1e9")
    assert int(final_state(run_dir)[0].step) == SWITCH
    assert Compiled.calls == [("begin", 0), ("abandon", -1)]


def test_a_signal_ends_the_wait_for_a_compiler_and_the_run_goes_on_from_there(fit, monkeypatch, tmp_path):
    want = final_state(fit(*RUN, run_dir=tmp_path / "whole"))[0].theta

    def told(self, state, chunk, say=print):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it still waits")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with monkeypatch.context() as patch:
        patch.setattr(Compiled, "prepare", told)
        with pytest.raises(Stopped):
            fit(*RUN)
    for number, handler in handlers.items():  # a command that was stopped ignores them from there on
        signal.signal(number, handler)
    assert int(final_state(tmp_path / "run")[0].step) == SWITCH
    assert Compiled.calls[-1] == ("abandon", -1)
    assert torch.equal(final_state(fit(*RUN, "ckpt_path=last"))[0].theta, want)


def test_what_cannot_be_traced_goes_on_eagerly(fit, monkeypatch, capsys, tmp_path):
    def refuse(self, state, chunk, say=print):
        raise Untraceable("aten._local_scalar_dense")

    monkeypatch.setattr(Compiled, "begin", refuse)
    theta = final_state(fit(*RUN))[0].theta
    said = capsys.readouterr().out
    assert said.count("training with program=eager, since the step cannot be compiled (aten._local_scalar_dense)") == 1
    eager = fit(*RUN, "program=eager", run_dir=tmp_path / "eager")
    assert torch.equal(theta, final_state(eager)[0].theta)


def test_chunks_grow_where_steps_become_faster(fit, monkeypatch):
    """Their size is chosen anew at the switch, as the speed is then, and holds for what is not read yet."""
    sizes = []
    chosen = iter((5, 25))
    monkeypatch.setattr(lit_module.ChunkModule, "_slots", lambda module, chunk: next(chosen))
    step = lit_module.ChunkModule.training_step

    def noted(module, chunk, batch_idx):
        sizes.append((module.step, len(chunk.batch_rows)))
        step(module, chunk, batch_idx)

    monkeypatch.setattr(lit_module.ChunkModule, "training_step", noted)
    fit(*RUN, "slots=null", "averaging=0")
    assert max(size for at, size in sizes if at < SWITCH) == 5
    assert sizes[-1][1] >= 20
    assert sum(size for _, size in sizes) == 90
