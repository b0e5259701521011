"""`svi doctor`: what is wrong is named with its remedy, and nothing else is."""

import socket

import pytest
from app_tools import config, svi

from trainer.distributed.ranks import World
from trainer.verbs import doctor
from trainer.verbs.doctor import Finding, Node

NODE = Node("a", "3.11", "2.13", "0.1", 8, (), "/usr/bin/g++", 10**12)


def wrong(findings: list[Finding]) -> list[str]:
    return [finding.said for finding in findings if finding.state == "wrong"]


def test_machines_alike_with_all_they_need_have_nothing_wrong():
    nodes = [NODE, NODE._replace(host="b")]
    assert not wrong(doctor._software(nodes) + doctor._machines(nodes, World(4, 2, 0, True), None))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"torch": "2.12"}, "2.12 on b, 2.13 on a: start all ranks from one environment."),
        ({"compiler": None}, "none on b: install g++"),
        ({"cache_room": -1}, "on b cannot be written"),
        ({"cache_room": 10}, "0.0 GiB are free"),
        ({"cores": 3}, "2 ranks x 2 threads on 3 cores of b: 2 x 2 > 3"),
        ({"gpus": ("H100",)}, "2 ranks for 1 GPU on b"),
    ],
)
def test_what_is_wrong_with_one_machine_is_named(change, sentence):
    nodes = [NODE, NODE._replace(host="b", **change)]
    said = wrong(doctor._software(nodes) + doctor._machines(nodes, World(4, 2, 0, True), 2))
    assert len(said) == 1
    assert sentence in said[0]


def test_a_folder_that_cannot_be_written_is_no_cache(tmp_path):
    (tmp_path / "file").touch()
    assert doctor._room(tmp_path / "file") == -1
    assert doctor._room(tmp_path / "new") > 0
    assert not list((tmp_path / "new").iterdir())


def test_a_task_that_srun_did_not_start_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "job_facts", lambda job: {"TimeLimit": "01:00:00", "Requeue": "0"})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    alone = World(1, 1, 0, False)
    found = doctor._slurm(alone)
    assert [finding.what for finding in found] == ["Slurm", "requeue", "srun"]
    assert "4 tasks, and this is none of them" in wrong(found)[0]
    assert not wrong(doctor._slurm(World(4, 4, 0, True)))


def test_the_verb_prints_a_line_for_each_and_exits_with_1_where_one_is_wrong(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_tracking", lambda: Finding("W&B", "note", "offline"))
    assert doctor.run(config("doctor", "threads=1"), tmp_path) == 0.0
    assert "nothing is wrong" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        doctor.run(config("doctor", "threads=10000"), tmp_path)
    assert ended.value.code == 1
    assert "10,000 threads" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_ranks_find_each_other_see_one_folder_and_agree_on_time(tmp_path, free_port):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port}", "-m", "trainer")
    done = svi("doctor", "threads=1", f"folder={tmp_path}", launcher=launcher, WANDB_MODE="offline", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "2 on 1 machine, a sum over them takes" in done.stdout
    assert f"{tmp_path} is the same on all ranks" in done.stdout
    assert socket.gethostname() in done.stdout
    assert not list(tmp_path.iterdir())
