"""Killed at any step and continued: bit for bit the run that was never stopped."""

import json
import signal
import time

import pytest
import torch
from app_tools import final_state, start, svi, tensors

from trainer.engine import checkpoint
from trainer.errors import UserError

ARGUMENTS = ("batch_size=256", "max_steps=60", "slots=16", "checkpoint.every_n_steps=7", "trainer=cpu", "threads=1",
             "program=eager", "recipe=plain")  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = svi("train", "model._target_=app_models.dying", f"data.path={shards}", f"run_dir={run_dir}", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    return run_dir


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.mark.slow
def test_killed_twice_in_one_epoch_and_continued(shards, tmp_path, uninterrupted):
    """SIGKILL in the middle of steps 17 and 25 (an epoch has 11 steps), each past a checkpoint (a multiple of 7)."""
    common = ("train", f"data.path={shards}", f"run_dir={tmp_path}/run", "ckpt_path=last", *ARGUMENTS)
    for call in (55, 45):  # calls of the model: 23 for the checks, then two a step
        died = svi(*common, "model._target_=app_models.dying", f"model.at={call}")
        assert died.returncode == -signal.SIGKILL
        assert not (tmp_path / "run" / "metrics.json").exists()
    done = svi(*common, "model._target_=app_models.dying")
    assert done.returncode == 0, done.stderr
    assert "continuing from step 21" in done.stdout
    assert same_bits(final_state(tmp_path / "run")[0], final_state(uninterrupted)[0])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["elbo"] == pytest.approx(
        json.loads((uninterrupted / "metrics.json").read_text())["elbo"], abs=0
    )


@pytest.mark.slow
def test_a_compiled_run_killed_from_outside_and_continued(shards, tmp_path):
    """Wherever SIGKILL finds it: between two chunks, in one, or while it saves (fifty times in a run)."""
    common = ("train", "model._target_=app_models.linear", f"data.path={shards}", "batch_size=256", "trainer=cpu",
              "threads=1", "stop=budget", "max_steps=20000", "checkpoint.every_n_steps=400",
              "ckpt_path=last")  # fmt: skip
    whole = svi(*common, f"run_dir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    for _ in range(2):
        saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
        run = start(*common, f"run_dir={tmp_path}/run")
        while run.poll() is None and checkpoint.newest(tmp_path / "run" / "checkpoints") == saved:
            time.sleep(0.01)  # leaves the processor to the run
        run.kill()
        assert run.wait() == -signal.SIGKILL
    done = svi(*common, f"run_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert "continuing from step" in done.stdout
    assert same_bits(final_state(tmp_path / "run")[0], final_state(tmp_path / "whole")[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_and_exits_with_its_code(shards, tmp_path, uninterrupted, number):
    common = ("train", f"data.path={shards}", f"run_dir={tmp_path}/run", "ckpt_path=last", *ARGUMENTS)
    told = svi(*common, "model._target_=app_models.dying", "model.at=50", f"model.number={int(number)}")
    assert told.returncode == 128 + number, told.stderr
    assert "continue with ckpt_path=last" in told.stdout
    assert 0 < int(final_state(tmp_path / "run")[0].step) < 60
    assert svi(*common, "model._target_=app_models.dying").returncode == 0
    assert same_bits(final_state(tmp_path / "run")[0], final_state(uninterrupted)[0])


def test_last_with_nothing_saved_starts_afresh(fit):
    assert int(final_state(fit("ckpt_path=last", "max_steps=5"))[0].step) == 5


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(fit, tmp_path):
    run_dir = fit("max_steps=20", "checkpoint.every_n_steps=10")
    newest = run_dir / "checkpoints" / "step_000000020.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="does not match the sha256"):
        assert checkpoint.newest(run_dir / "checkpoints") == run_dir / "checkpoints" / "step_000000010.ckpt"
    with pytest.raises(UserError, match=r"step_000000020.ckpt does not match the sha256"):
        checkpoint.load(newest)
    newest.write_bytes(content[:-100])
    with pytest.warns(UserWarning, match="bytes where its manifest says"):
        checkpoint.newest(run_dir / "checkpoints")
    (run_dir / "checkpoints" / "step_000000020.ckpt.json").unlink()
    assert checkpoint.newest(run_dir / "checkpoints").name == "step_000000010.ckpt"


def test_checkpoints_come_by_the_clock_and_the_newest_stay(fit):
    """At each chunk, where the clock asks for one every millisecond."""
    run_dir = fit("max_steps=50", "slots=10", "checkpoint.every_minutes=1e-9", "checkpoint.keep_last=3")
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("*.ckpt")) == [
        f"step_{step:09d}.ckpt" for step in (30, 40, 50)
    ]
    with pytest.raises(UserError, match="keep_last=0 must be a whole number from 1 up"):
        fit("ckpt_path=last", "max_steps=60", "checkpoint.keep_last=0")


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    import hashlib
    import pickle

    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    path = tmp_path / "step_000000001.ckpt"
    torch.save({"format": 1, "state": Evil()}, path)
    manifest = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size, "step": 1}
    path.with_name(path.name + ".json").write_text(json.dumps(manifest))
    with pytest.raises((UserError, pickle.UnpicklingError)):
        checkpoint.load(path)


@pytest.mark.slow
def test_a_value_that_is_not_finite_names_the_site_and_the_step(shards, tmp_path):
    died = svi(
        "train", "model._target_=app_models.exploding", f"data.path={shards}", f"run_dir={tmp_path}/run", *ARGUMENTS
    )
    assert died.returncode == 1
    assert "not finite at step" in died.stderr
    assert "y" in died.stderr.split("not finite at step")[1]
    assert "Traceback" not in died.stderr


def test_a_job_that_is_started_again_goes_on_from_its_own_newest_checkpoint(fit, tmp_path, monkeypatch, capsys):
    """Not once more from the file that its command names."""
    begun = fit("max_steps=10", "stop=budget", "recipe=plain", run_dir=tmp_path / "a")
    line = ("stop=budget", "recipe=plain", f"ckpt_path={checkpoint.newest(begun / 'checkpoints')}")
    fit("max_steps=20", *line, run_dir=tmp_path / "b")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    fit("max_steps=30", *line, run_dir=tmp_path / "b")
    assert "continuing from step 20" in capsys.readouterr().out
    fit("max_steps=30", *line, run_dir=tmp_path / "c")
    assert "continuing from step 10" in capsys.readouterr().out


def test_going_back_to_an_earlier_checkpoint_puts_the_later_ones_aside(fit, capsys):
    run_dir = fit("max_steps=30", "stop=budget", "recipe=plain", "checkpoint.every_n_steps=10",
                  "checkpoint.keep_last=3")  # fmt: skip
    early = run_dir / "checkpoints" / "step_000000010.ckpt"
    capsys.readouterr()
    fit("max_steps=15", "stop=budget", "recipe=plain", "checkpoint.keep_last=3", f"ckpt_path={early}")
    said = capsys.readouterr().out
    assert "set aside (.aside), since the run resumes from an earlier step: step_000000020.ckpt" in said
    assert checkpoint.newest(run_dir / "checkpoints") == run_dir / "checkpoints" / "step_000000015.ckpt"
    assert early.exists()
    assert len(list((run_dir / "checkpoints").glob("*.aside"))) == 2
