"""What a checkpoint keeps comes back as it was, and a resumed run takes over what still holds."""

from dataclasses import replace

import pytest
import torch

from trainer.engine.train_state import PlanChoice, Problem, TrainState

PLAN = PlanChoice(4, 64, 7, 256, 4, 0, 2, "digest")
PROBLEM = Problem(PLAN, {"guide.loc": [3]}, ["w", "y"], {"_target_": "Adam", "lr": 0.1}, 100, "0.1.0", 2, [20, 100])
MARKS = [(5, torch.arange(3.0)), (10, torch.ones(3))]
DONE = {
    "seconds": 12.5,
    "passes": 3,
    "no_newton_at": 40,
    "ending": 20,
    "stopped": "converged",
    "evidence": {"gain": 0.1},
}


def test_a_record_comes_back_as_it_was():
    record = TrainState(PROBLEM, marks=list(MARKS), **DONE)
    assert TrainState.of(record.state_dict()) == record


def test_a_plan_without_a_rest_is_written_without_one():
    rest = {"step": 5, "epoch": 1, "parts": []}
    assert "rest" not in TrainState(PROBLEM).state_dict()["plan"]
    made = TrainState(replace(PROBLEM, plan=replace(PLAN, rest=rest)))
    assert made.state_dict()["plan"]["rest"] == rest
    assert TrainState.of(made.state_dict()) == made


@pytest.mark.parametrize(
    ("now", "kept"),
    [
        (PROBLEM, True),
        (replace(PROBLEM, horizon=200), True),
        (replace(PROBLEM, rounds=[20, 200]), False),
        (replace(PROBLEM, plan=replace(PLAN, batch_size=32)), False),
    ],
    ids=["the same", "another horizon", "other rounds", "another plan"],
)
def test_means_of_segments_go_on_where_their_segments_do(now, kept):
    record = TrainState(now)
    shared = record.marks  # the stop rule holds this list
    record.resumed(TrainState(PROBLEM, marks=list(MARKS), **DONE))
    assert (record.problem, {name: getattr(record, name) for name in DONE}) == (now, DONE)
    assert record.marks is shared
    assert shared == (MARKS if kept else [])


def test_rounds_of_a_version_that_did_not_say_are_taken_for_the_same():
    record = TrainState(PROBLEM)
    record.resumed(TrainState(replace(PROBLEM, rounds=None), marks=list(MARKS)))
    assert record.marks == MARKS
