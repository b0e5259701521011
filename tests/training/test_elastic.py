"""A run goes on with other ranks, batch sizes and lanes: every row once an epoch, and no step but by the plan."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from app_tools import config, final_state, tensors

from scripts.kill_test import Run, distance, same_rows
from trainer.data.plan import Plan
from trainer.engine import checkpoint
from trainer.engine.row_log import logged_rows
from trainer.errors import UserError
from trainer.training.budget import Begun, update_of

OPTIONS = ("model=linear", "data.lanes=8", "draws=2", "recipe=plain", "max_steps=60", "slots=4",
           "program=eager")  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("whole"), shards, OPTIONS)
    run.launch(1, 256)
    return run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_ranks_killed_then_two_killed_then_one(shards: Path, tmp_path: Path, uninterrupted: Run) -> None:
    """SIGKILL of all ranks at random moments; steps after the last checkpoint are taken again, with the same rows."""
    run, chance = Run(tmp_path, shards, OPTIONS), random.Random()
    for ranks in (4, 2):
        killed = run.launch(ranks, 256, (chance.randrange(1, 25), chance.random() / 5))
        assert killed.last < 60
    assert run.launch(1, 256).last == 59
    assert same_rows(logged_rows(run.log), logged_rows(uninterrupted.log))
    assert distance(run.state, uninterrupted.state) < 1e-12


def rows_of(log: Path) -> np.ndarray:
    """How often each row was taken."""
    return np.unique_counts(np.concatenate(list(logged_rows(log).values()))).counts


def test_other_batch_sizes_lanes_and_draws_from_the_row_where_it_stands(fit, tmp_path, capsys):
    """Cut in the middle of an epoch three times; five epochs are five, in whatever steps they were taken."""
    log, common = tmp_path / "rows", ("recipe=plain", "max_epochs=5", f"data.log_rows={tmp_path / 'rows'}")
    fit(*common, "max_steps=17")
    for changed, said, step in (
        (("batch_size=512", "max_steps=20"), "continuing from step 17 with batch_size=512 (it was 256)", 20),
        (("batch_size=512", "max_steps=22"), "continuing from step 20\n", 22),
        (("batch_size=96", "max_steps=40", "data.lanes=6", "draws=3"), "batch_size=96 (it was 512), data.lanes=6", 40),
    ):
        run_dir = fit(*common, *changed, "ckpt_path=last")
        assert said in capsys.readouterr().out
        assert int(final_state(run_dir)[0].step) == step
    fit(*common, "batch_size=96", "max_steps=null", "ckpt_path=last")
    steps = logged_rows(log)
    assert set(rows_of(log)) == {5}
    assert list(steps) == list(range(len(steps)))
    assert [max(map(len, list(steps.values())[a:b])) for a, b in ((0, 17), (17, 22), (22, None))] == [248, 488, 96]
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert (metrics["epochs"], metrics["steps"], metrics["stop_reason"]) == (5, len(steps), "budget")
    facts = final_state(run_dir)[1]["plan"]
    assert (facts["lanes"], facts["draws"], facts["batch_size"]) == (6, 3, 96)


def test_a_changed_run_is_continued_bit_for_bit(fit, tmp_path):
    """What took over is in the checkpoint: cut again, in the epoch that was cut, it ends in the same bits."""
    common = ("recipe=plain", "start=zero", "rounds=2", "averaging=0.25", "estimator=anchor", "max_steps=900")
    states = []
    for name, cuts in (("whole", ()), ("cut", (20, 25, 33))):
        run_dir = fit(*common, "max_steps=17", run_dir=tmp_path / name)
        for step in (*cuts, 60):
            changed = ("batch_size=512", "checkpoint.every_n_steps=1", "checkpoint.keep_last=90")
            fit(*common, *changed, "max_steps=60", "ckpt_path=last", run_dir=run_dir)
            for path in (run_dir / "checkpoints").glob("*"):
                if int(path.name[5:14]) > step:
                    path.unlink()
            (run_dir / "metrics.json").unlink()
        states.append(final_state(run_dir)[0])
    assert int(states[0].step) == 60
    assert all(map(torch.equal, *map(tensors, states)))


def test_a_checkpoint_of_the_version_before_goes_on(fit, tmp_path):
    """Without rounds and rest among its facts."""
    run_dir = fit("max_steps=17", "recipe=plain")
    path = checkpoint.newest(run_dir / "checkpoints")
    state, facts = checkpoint.load(path)
    del facts["rounds"]
    assert "rest" not in facts["plan"]
    checkpoint.save(path, state, facts)
    (run_dir / "metrics.json").unlink()
    fit("max_steps=30", "recipe=plain", "batch_size=64", "ckpt_path=last")
    assert int(final_state(run_dir)[0].step) == 30


def test_what_does_not_fit_is_a_sentence(fit):
    run_dir = fit("max_steps=5", "recipe=plain", "draws=4")
    for wrong, sentence in (
        (("batch_size=100", "data.lanes=8"), r"batch_size\(100\) % lanes\(8\) != 0"),
        (("draws=3",), r"lanes\(8\) % draws\(3\) != 0"),
        (("seed=1",), "the checkpoint was trained with seed=0, not 1"),
        (("data.memory=100",), r"take \d+,\d+ bytes on a rank, 3 times over .* data\.memory=100: give data\.memory="),
    ):
        with pytest.raises(UserError, match=sentence):
            fit("max_steps=9", "recipe=plain", "ckpt_path=last", *wrong, run_dir=run_dir)


def plan(batch_size: int = 96, **more) -> Plan:
    return Plan(np.full(10, 100), 0, 8, batch_size, **more)


def rounds(*options: str, of: Plan, begun: Begun | None = None) -> list[tuple[int, int]]:
    update = update_of(config("train", "data.path=x", *options), of, whitened=True, anchored=0, begun=begun)
    return [(each.start, each.horizon) for each in update.rounds]


def test_the_rounds_to_come_keep_their_places():
    whole = rounds("max_steps=4500", of=plan())
    ends = [end for _, end in whole]
    assert ends == [300, 900, 2100, 4500]
    assert rounds("max_steps=4500", of=plan(), begun=Begun(500, ends)) == whole
    longer = [(0, 300), (300, 1300), (1300, 3700), (3700, 8500)]
    assert rounds("max_steps=8500", of=plan(), begun=Begun(500, ends)) == longer
    assert rounds("max_steps=9000", of=plan(), begun=Begun(4500, ends)) == [*whole[:3], (2100, 9000)]
    shorter = [(0, 300), (300, 520), (520, 580), (580, 700)]
    assert rounds("max_steps=700", of=plan(), begun=Begun(500, ends)) == shorter


def test_a_budget_in_epochs_counts_rows_and_one_in_steps_does_not():
    """Half of the epochs by steps of 96 rows, then by some of 192: half as many, and the rounds end at their rows."""
    before, epochs = plan(), 400
    ends = [end for _, end in rounds(f"max_epochs={epochs}", of=before)]
    assert ends == [293, 880, 2053, 4400]
    after, begun = plan(192, rest=before.rest_at(2100)), Begun(2100, ends)
    found = [end for _, end in rounds(f"max_epochs={epochs}", of=after, begun=begun)]
    assert found[:3] == ends[:3]
    assert after.epochs_at(found[-1]) == epochs
    assert rounds("max_steps=4400", of=after, begun=begun)[-1][1] == 4400
    early = Begun(500, ends)
    after = plan(192, rest=before.rest_at(500))
    for old, new in zip(ends[1:], rounds(f"max_epochs={epochs}", of=after, begun=early)[1:], strict=True):
        assert after.epochs_at(new[1]) == pytest.approx(before.epochs_at(old), abs=0.5)
