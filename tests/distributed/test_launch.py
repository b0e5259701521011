"""Which process is a rank: what Slurm's, torchrun's and nobody's variables say."""

import os

import pytest
from omegaconf import OmegaConf

from trainer.distributed.launch import first_host, in_slurm_step, launched_rank
from trainer.distributed.ranks import World, _set_meeting, world
from trainer.errors import UserError

TASK = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_ID": "0"}
ALONE = OmegaConf.create({"devices": 1, "num_nodes": 1, "accelerator": "cpu"})
NAMES = (
    *TASK,
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_NODELIST", "SLURM_STEP_NODELIST"),
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID"),
)


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_a_task_of_srun_is_a_rank(environment):
    environment(**TASK)
    assert world(ALONE) == World(4, 4, 2, True)
    assert launched_rank() == 2


@pytest.mark.parametrize("step", range(0xFFFFFFFA, 0x100000000))
def test_a_shell_or_a_batch_script_is_alone(environment, step):
    """4294967290 is the interactive step, 291 the batch script, 292 the extern one, 293 a pending one, 294 none."""
    environment(**TASK | {"SLURM_STEP_ID": str(step), "SLURM_PROCID": "0"})
    assert world(ALONE) == World(1, 1, 0, False)
    assert not in_slurm_step()


@pytest.mark.parametrize("changed", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "1"}, {"SLURM_STEP_ID": ""}])
def test_one_task_of_an_allocation_of_more_is_alone(environment, changed):
    environment(**TASK | changed)
    assert world(ALONE) == World(1, 1, 0, False)


def test_fewer_tasks_than_the_allocation_has(environment):
    environment(**TASK, SLURM_STEP_NUM_TASKS="3", SLURM_STEP_NUM_NODES="1")
    assert world(ALONE) == World(3, 3, 2, True)


@pytest.mark.parametrize(
    ("given", "address", "port"),
    [
        ({}, "node3", "15007"),
        ({"MASTER_PORT": "29511"}, "node3", "29511"),
        ({"MASTER_ADDR": "10.0.0.1"}, "10.0.0.1", "15007"),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}, "10.0.0.1", "1"),
    ],
)
def test_where_ranks_meet(environment, monkeypatch, given, address, port):
    environment(**TASK | {"SLURM_JOB_ID": "30007"}, SLURM_NODELIST="node[3-5]", **given)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    _set_meeting(World(4, 4, 2, True))
    found = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")}
    assert found == {"MASTER_ADDR": address, "MASTER_PORT": port, "RANK": "2", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node3", "node3"),
        ("node[3-5]", "node3"),
        ("node[007,9-12]", "node007"),
        ("node[3-5],other[1-2]", "node3"),
        ("a,node[3-5]", "a"),
        ("rack1-node[3-5]-ib,b", "rack1-node3-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_ranks_of_a_step_meet_at_its_first_node(environment):
    """Which need not be the first of the job."""
    environment(**TASK, SLURM_NODELIST="node[3-5]", SLURM_STEP_NODELIST="node[4-5]")
    _set_meeting(World(4, 4, 2, True))
    assert os.environ["MASTER_ADDR"] == "node4"


def test_a_port_that_is_none(environment):
    environment(MASTER_ADDR="localhost", MASTER_PORT="http")
    with pytest.raises(UserError, match="MASTER_PORT=http is not a port"):
        _set_meeting(World(4, 4, 2, True))
