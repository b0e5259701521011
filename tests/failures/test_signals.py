"""A signal has one outcome whenever it comes, to whichever rank: 128 + n, nothing half-written, nothing lost."""

import json
import os
import signal
import subprocess
import time

import app_tools
import pytest
import torch
from app_tools import final_state, tensors
from failure_tools import ARGUMENTS, Fault, free_port, start

from trainer.engine import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("failures")]
AUTO = ("recipe=auto", "dtype=float64", "checkpoint.every_n_steps=null", "max_steps=200", "slots=50")
LAUNCHED = [each for each in ARGUMENTS if not each.startswith(("model.", "trainer=", "max_steps="))]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    run = start(shards, tmp_path_factory.mktemp("whole") / "run").wait()
    assert run.codes == [0, 0], run.said(0) + run.said(1)
    return run.folder


def assert_same(run_dir, other):
    """The same bits, and the same figures."""
    one, two = (tensors(final_state(each)[0]) for each in (run_dir, other))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    figures = [json.loads((each / "metrics.json").read_text()) for each in (run_dir, other)]
    assert figures[0]["elbo"] == figures[1]["elbo"]


def assert_stopped(run, name, where):
    number = getattr(signal, name)
    assert run.codes == [128 + number] * len(run.codes)
    told = "".join(run.said(rank) for rank in range(len(run.codes)))
    assert told.count("stopped by") == told.count(f"stopped by {name} {where}; continue with ckpt_path=last") == 1
    assert "Traceback" not in told
    assert not list(run.folder.rglob("*.tmp"))
    return f"stopped by {name} {where}; continue with ckpt_path=last"


@pytest.mark.failure(what="SIGTERM, to one rank of several", lost="nothing")
def test_one_rank_is_told_while_it_trains(shards, tmp_path, whole, seen):
    run = start(shards, tmp_path / "run", faults=[Fault(1, 20, "SIGTERM")]).wait()
    said = assert_stopped(run, "SIGTERM", "at step 22")
    assert start(shards, run.folder).wait().codes == [0, 0]
    assert_same(run.folder, whole)
    seen(said, 143)


@pytest.mark.failure(what="SIGUSR1, to all ranks (Slurm, before the time is up)", lost="nothing: it is queued again")
def test_all_ranks_are_told(shards, tmp_path, seen):
    run = start(shards, tmp_path / "run", faults=[Fault(0, 18, "SIGUSR1"), Fault(1, 20, "SIGUSR1")]).wait()
    seen(assert_stopped(run, "SIGUSR1", "at step 20"), 138)
    assert int(final_state(run.folder)[0].step) == 20


@pytest.mark.failure(what="Ctrl-C, twice", lost="the chunk")
def test_a_second_ctrl_c_ends_it_at_once(shards, tmp_path, seen):
    run = start(shards, tmp_path / "run", ranks=1, faults=[Fault(0, 20, "SIGINT SIGINT")]).wait()
    seen(assert_stopped(run, "SIGINT", "at step 20"), 130)
    assert int(final_state(run.folder)[0].step) == 20


@pytest.mark.failure(what="SIGTERM before training (while it compiles)", lost="nothing")
def test_one_rank_is_told_before_training(shards, tmp_path, seen):
    run = start(shards, tmp_path / "run", faults=[Fault(1, 1, "SIGTERM", "prepare")]).wait()
    seen(assert_stopped(run, "SIGTERM", "before training"), 143)
    assert checkpoint.newest(run.folder / "checkpoints") is None
    assert not (run.folder / "metrics.csv").exists()


@pytest.mark.failure(what="SIGTERM during the final evaluation", lost="the evaluation, which the resumed run makes")
def test_one_rank_is_told_while_the_answer_is_evaluated(shards, tmp_path, whole, seen):
    run = start(shards, tmp_path / "run", faults=[Fault(1, 3, "SIGTERM", "block")]).wait()
    said = assert_stopped(run, "SIGTERM", "at step 40")
    assert not (run.folder / "metrics.json").exists()
    assert start(shards, run.folder).wait().codes == [0, 0]
    assert_same(run.folder, whole)
    seen(said, 143)


@pytest.mark.failure(what="SIGTERM during Newton steps", lost="their passes, which the resumed run makes")
def test_a_signal_between_passes_over_all_rows(shards, tmp_path, seen):
    whole = start(shards, tmp_path / "whole", *AUTO, ranks=1).wait()
    assert whole.codes == [0], whole.said(0)
    run = start(shards, tmp_path / "run", *AUTO, ranks=1, faults=[Fault(0, 5, "SIGTERM", "block")]).wait()
    state, facts = final_state(run.folder)
    assert int(state.step) == facts["ending"] == 200
    said = assert_stopped(run, "SIGTERM", "at step 200")
    assert start(shards, run.folder, *AUTO, ranks=1).wait().codes == [0]
    assert_same(run.folder, whole.folder)
    seen(said, 143)


def launch(shards, run_dir, *arguments, launcher=app_tools.SVI):
    """A launch as a user's, in a process group of its own."""
    command = ("train", f"data.path={shards}", f"run_dir={run_dir}", *LAUNCHED, *arguments)
    return app_tools.start(*command, launcher=launcher, output=subprocess.PIPE, start_new_session=True)


def ended(process):
    """(exit code, stdout, stderr), once no process of its group is left."""
    out, err = process.communicate(timeout=150)
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return process.returncode, out, err
        time.sleep(0.1)
    raise AssertionError("a process is left")


@pytest.mark.failure(what="Ctrl-C while ranks are launched", lost="nothing")
def test_ctrl_c_while_ranks_are_launched(shards, tmp_path, seen):
    run = launch(shards, tmp_path / "run", "model._target_=app_models.linear", "trainer=ddp_sim", "max_steps=40")
    for line in run.stdout:
        if "rows to train on" in line:
            break
    os.killpg(run.pid, signal.SIGINT)
    code, out, _ = ended(run)
    assert code == 130
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None
    seen("stopped by SIGINT before training; continue with ckpt_path=last" if "stopped by" in out else "nothing", code)


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2")


@pytest.mark.failure(what="a rank is killed under `torchrun --max-restarts=1`", lost="the chunk; it resumes by itself")
def test_torchrun_starts_the_ranks_again(shards, tmp_path, whole, seen):
    launcher = (*TORCHRUN, "--max-restarts=1", f"--master-port={free_port()}", "-m", "trainer")
    run = launch(shards, tmp_path / "run", "model._target_=app_models.dying", "model.at=70", "model.rank=1",
                 "trainer=cpu", "max_steps=40", launcher=launcher)  # fmt: skip
    code, out, err = ended(run)
    assert code == 0, err
    assert "continuing from step" in out
    assert_same(tmp_path / "run", whole)
    seen("torchrun's note that it starts the ranks again; continuing from step 24", code)


@pytest.mark.failure(what="SIGTERM to torchrun", lost="nothing")
def test_the_agent_is_told(shards, tmp_path, seen):
    launcher = (*TORCHRUN, f"--master-port={free_port()}", "-m", "trainer")
    run = launch(shards, tmp_path / "run", "model._target_=app_models.linear", "trainer=cpu", "max_steps=100000",
                 launcher=launcher)  # fmt: skip
    for line in run.stdout:
        if line.startswith("step "):
            break
    run.terminate()
    code, out, _ = ended(run)
    assert "stopped by SIGTERM at step" in out
    assert int(final_state(tmp_path / "run")[0].step) > 0
    seen(next(line for line in out.splitlines() if line.startswith("stopped by")), code)
