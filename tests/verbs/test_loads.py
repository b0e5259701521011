"""What each verb loads: help and the verbs that do not train start without torch, Lightning or a tracker."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "pyro", "pytorch_lightning", "torchmetrics", "matplotlib", "scipy", "pandas", "pyarrow", "wandb",
         "webdataset", "optuna", "sympy", "numpy", "pyarrow.compute", "pyarrow.dataset")  # fmt: skip
ROWS = {"numpy", "pyarrow"}
MODEL = {*ROWS, "torch", "pyro", "sympy"}  # sympy by torch where it is asked for
TRAINING = {*MODEL, "pytorch_lightning", "torchmetrics", "matplotlib", "scipy"}  # the last two by torchmetrics
MAY_LOAD = {
    "shard": ROWS,
    "verify": ROWS,
    "inspect": ROWS,
    "runs": set(),
    "sync": set(),
    "predict": MODEL,
    "latents": MODEL,
    "export": MODEL,
    "doctor": MODEL,
    "train": TRAINING,
    "fit": TRAINING,
}
PROGRAM = """
import sys
sys.argv = ["svi"]
{work}
print("loaded", *(name for name in {heavy} if name in sys.modules))
"""


def loaded(work: str) -> set[str]:
    """The heavy modules that a new process has after ``work``."""
    program = PROGRAM.format(work=work, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("verb", MAY_LOAD)
def test_a_verb_loads_what_it_may(verb):
    assert loaded(f"import trainer.verbs.{verb}") <= MAY_LOAD[verb]


def test_every_verb_is_listed():
    from trainer.cli import VERBS

    assert MAY_LOAD.keys() - {"fit"} == VERBS.keys()


@pytest.mark.parametrize("verb", ["train", "shard"])
def test_help_loads_nothing_heavy(verb):
    work = f"from trainer.cli import main\ntry:\n    main(['{verb}', '--help'])\nexcept SystemExit:\n    pass"
    assert loaded(work) == set()


def test_what_is_heavy_is_seen():
    assert loaded("import numpy") == {"numpy"}
