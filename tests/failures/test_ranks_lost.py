"""Something happens to one of two ranks: the other leaves in seconds, the cause is told once, the run can go on."""

import pytest
import torch
from app_tools import final_state, tensors
from failure_tools import Fault, Run, start

from trainer.engine import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("failures")]
GONE = "it was killed (out of memory?) or stopped, or its machine or the network failed; continue with ckpt_path=last."


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The run to which nothing happens."""
    run = start(shards, tmp_path_factory.mktemp("whole") / "run").wait()
    assert run.codes == [0, 0], run.said(0) + run.said(1)
    return final_state(run.folder)[0]


def saved(run: Run) -> int:
    return int(final_state(run.folder)[0].step)


def assert_goes_on(run: Run, shards, whole):
    """To the bits of the run to which nothing happened."""
    again = start(shards, run.folder).wait()
    assert again.codes == [0, 0], again.said(0) + again.said(1)
    state = final_state(run.folder)[0]
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(whole), strict=True))


@pytest.mark.failure(what="a rank is killed (SIGKILL)", lost="the chunk (a tenth of a second)")
def test_a_rank_is_killed(shards, tmp_path, whole, seen):
    run = start(shards, tmp_path / "run", faults=[Fault(1, 20, "SIGKILL")]).wait()
    assert run.codes == [1, -9]
    assert run.err(0) == f"svi train: rank 1 no longer answers: {GONE}\n"
    assert saved(run) == 20
    assert_goes_on(run, shards, whole)
    seen(run.err(0), run.codes[0])


@pytest.mark.failure(what="rank 0, which saves, is killed", lost="the steps since the last checkpoint")
def test_rank_0_is_killed_and_the_run_goes_on_with_one_rank(shards, tmp_path, whole, seen):
    run = start(shards, tmp_path / "run", faults=[Fault(0, 20, "SIGKILL")]).wait()
    assert run.codes == [-9, 1]
    assert run.err(1) == f"svi train: rank 0 no longer answers: {GONE}\n"
    assert saved(run) == 16
    alone = start(shards, run.folder, ranks=1).wait()
    assert alone.codes == [0], alone.said(0)
    assert torch.allclose(final_state(run.folder)[0].theta, whole.theta, rtol=0, atol=1e-12)
    seen(run.err(1), run.codes[1])


@pytest.mark.failure(what="an exception on one rank", lost="the chunk")
def test_an_exception_on_one_rank_is_the_one_that_is_shown(shards, tmp_path, seen):
    run = start(shards, tmp_path / "run", faults=[Fault(1, 20, "raise")]).wait()
    assert run.codes == [1, 1]
    assert "ValueError: a fault of rank's own" in run.err(1)
    assert run.err(0) == ""
    seen("its traceback, and nothing of the other ranks", 1)


@pytest.mark.failure(what="a rank hangs (SIGSTOP)", lost="the chunk")
def test_a_rank_that_is_silent_is_named(shards, tmp_path, seen):
    run = start(shards, tmp_path / "run", "trainer.timeout=2", faults=[Fault(1, 20, "SIGSTOP")]).wait(leave=[1])
    assert run.codes == [1, -9]
    assert run.err(0) == f"svi train: rank 1 no longer answers within trainer.timeout=: {GONE}\n"
    assert saved(run) == 20
    seen(run.err(0), run.codes[0])


@pytest.mark.failure(what="a value is not finite on one rank", lost="the steps since the last checkpoint")
def test_a_row_that_gives_nan_is_named_by_all_at_the_same_step(table, tmp_path, seen):
    shards, x = table
    row = int(x[:, 0].argmax())
    run = start(
        shards, tmp_path / "run", "model._target_=app_models.breaking", f"model.bad={float(x[row, 0])}", "model.at=50",
        "checkpoint.every_n_steps=null",
    ).wait()  # fmt: skip
    assert run.codes == [1, 1]
    told = run.err(0) + run.err(1)
    assert told.count("\n") == 1
    assert f"y; lower optimizer.lr, or look at row {row} (row_id)." in told
    assert checkpoint.newest(run.folder / "checkpoints") is None
    seen(told.replace(f"row {row} ", "row 17 "), 1)


@pytest.mark.failure(what="the ranks diverge (a flipped bit)", lost="the steps since the last checkpoint")
def test_ranks_that_drift_apart_are_found_before_they_are_saved(shards, tmp_path, seen):
    run = start(shards, tmp_path / "run", faults=[Fault(1, 18, "drift")]).wait()
    assert run.codes == [2, 2]
    told = run.err(0) + run.err(1)
    assert told.count("different parameters at step 24") == told.count("\n") == 1
    assert saved(run) == 16
    seen(told, 2)


@pytest.mark.failure(what="the port of the ranks is taken", lost="nothing")
def test_a_port_that_is_taken(shards, tmp_path, seen):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        run = start(shards, tmp_path / "run", port=port)
        run.processes[0].join(30)
        run.end()
    assert run.codes[0] == 2
    assert f"port {port}" in run.err(0)
    seen(run.err(0).replace(str(port), "29500"), 2)
