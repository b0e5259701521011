"""Several ranks under every launcher: what one would compute, one folder, no process left behind."""

import signal

import pytest
import torch
from app_tools import final_state, svi

ARGUMENTS = ("batch_size=256", "max_steps=40", "slots=16", "draws=2", "dtype=float64", "checkpoint.every_n_steps=20",
             "recipe=plain")  # fmt: skip
MODEL = "model._target_=app_models.linear"
SLURM_TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NNODES": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
              "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node1"}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("launchers")]


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    done = svi("train", MODEL, f"data.path={shards}", f"run_dir={run_dir}", "trainer=cpu", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    return final_state(run_dir)[0]


@pytest.mark.parametrize(
    ("program", "around"), [("fused", {}), ("eager", SLURM_TASK)], ids=["by hand", "one task of Slurm"]
)
def test_lightnings_launcher_gives_what_one_rank_gives(shards, tmp_path, alone, program, around):
    overrides = ("trainer=ddp_sim", f"program={program}", *ARGUMENTS)
    done = svi("train", MODEL, f"data.path={shards}", f"run_dir={tmp_path}/run", *overrides, **around)
    assert done.returncode == 0, done.stderr
    state, facts = final_state(tmp_path / "run")
    assert facts["world_size"] == 2
    assert torch.allclose(state.theta, alone.theta, rtol=0, atol=1e-12)
    assert torch.allclose(state.average, alone.average, rtol=0, atol=1e-12)


def test_torchrun_gives_what_one_rank_gives(shards, tmp_path, alone, free_port):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port}", "-m", "trainer")
    done = svi(
        "train", MODEL, f"data.path={shards}", f"run_dir={tmp_path}/run", "trainer=cpu", *ARGUMENTS, launcher=launcher
    )
    assert done.returncode == 0, done.stderr
    assert torch.allclose(final_state(tmp_path / "run")[0].theta, alone.theta, rtol=0, atol=1e-12)


def test_killed_on_two_ranks_and_continued_on_one(shards, tmp_path, alone):
    """The same rows and the same noise on another world size: the same answer to rounding."""
    common = ("train", f"data.path={shards}", f"run_dir={tmp_path}/run", "ckpt_path=last", *ARGUMENTS)
    died = svi(*common, "model._target_=app_models.dying", "model.at=70", "model.rank=1", "trainer=ddp_sim",
               "program=eager")  # fmt: skip
    assert died.returncode != 0
    assert int(final_state(tmp_path / "run")[0].step) == 20
    done = svi(*common, MODEL, "trainer=cpu")
    assert done.returncode == 0, done.stderr
    assert torch.allclose(final_state(tmp_path / "run")[0].theta, alone.theta, rtol=0, atol=1e-12)


def test_a_signal_to_one_rank_stops_all(shards, tmp_path):
    told = svi(
        "train", "model._target_=app_models.dying", "model.at=60", "model.rank=1",
        f"model.number={int(signal.SIGTERM)}", f"data.path={shards}", f"run_dir={tmp_path}/run", "trainer=ddp_sim",
        "program=eager", *ARGUMENTS,
    )  # fmt: skip
    assert told.returncode == 128 + signal.SIGTERM, told.stderr
    assert 0 < int(final_state(tmp_path / "run")[0].step) < 40


def test_a_sweep_of_two_rank_runs(shards, tmp_path):
    """`-m`: each job launches its own ranks, from its own resolved config."""
    done = svi(
        "train", "-m", MODEL, f"data.path={shards}", "trainer=ddp_sim", "optimizer.lr=0.01,0.05",
        f"hydra.sweep.dir={tmp_path}/sweep", *ARGUMENTS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rates = [final_state(tmp_path / "sweep" / job)[1]["optimizer"]["lr"] for job in "01"]
    assert rates == [0.01, 0.05]
