"""Training on several folders, and on what is left of damaged ones: N, rows and answer are those of the rest."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from app_models import linear
from app_tools import WEIGHTS, config, final_state, svi
from rich.console import Console
from servers import faulty
from shard_tools import flip, write_folder

from trainer import Posterior
from trainer import fit as fit_table
from trainer.data.packing.pack import pack
from trainer.data.shards import remote
from trainer.data.shards.files import read_index
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.index import ROW_ID
from trainer.distributed.ranks import World
from trainer.errors import UserError
from trainer.training.quarantine import without_damage
from trainer.verbs import inspect, verify

TRAIN = ("train", "model._target_=app_models.linear", "batch_size=256", "max_steps=40", "threads=1", "program=eager",
         "stop=budget", "recipe=plain", "slots=20")  # fmt: skip


def metrics(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "metrics.json").read_text())


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tables, and one of the rows of both."""
    place, rng, made = tmp_path_factory.mktemp("tables"), np.random.default_rng(1), []
    for name, rows in (("monday", 700), ("tuesday", 500)):
        x = rng.normal(size=(rows, 3)).astype(np.float32)
        made.append({"x": x, "y": (x @ WEIGHTS + 0.5 * rng.normal(size=rows)).astype(np.float32)})
        np.savez(place / f"{name}.npz", **made[-1])
    np.savez(place / "both.npz", **{name: np.concatenate([each[name] for each in made]) for name in ("x", "y")})
    return [place / f"{name}.npz" for name in ("monday", "tuesday", "both")]


@pytest.fixture(scope="module")
def folders(tables: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tables packed, in blocks of 64 rows, three in a shard."""
    place = tmp_path_factory.mktemp("folders")
    for table in tables:
        pack(table, place / table.stem, block_rows=64, held_out=0, shard_bytes=10_000)
    return [place / table.stem for table in tables]


def test_two_folders_have_the_posterior_of_the_table_of_both(folders):
    two, one = (
        fit_table(linear, data, progress=False, options={"program": "eager"}) for data in (folders[:2], folders[2])
    )
    assert two.metrics["rows"] == one.metrics["rows"] == 1200
    for ours, theirs in zip(two.summary(), one.summary(), strict=True):
        np.testing.assert_allclose(ours.mean, theirs.mean, atol=0.02 * float(theirs.sd.min()))
    error = 4 * (two.metrics["elbo_se"] + one.metrics["elbo_se"])
    assert two.metrics["elbo"] == pytest.approx(one.metrics["elbo"], abs=error)


def test_tables_in_a_list_are_packed_alike(fit, tables, tmp_path):
    given = [shutil.copy(table, tmp_path) for table in tables[:2]]
    run = fit(f"data.path=[{given[0]},{given[1]}]")
    assert metrics(run)["rows"] + metrics(run)["held_out_rows"] == 1200


def test_a_run_does_not_go_on_with_other_folders(fit, folders):
    fit(f"data.path=[{folders[0]},{folders[1]}]", "max_steps=20")
    with pytest.raises(UserError, match="the checkpoint was trained on other data"):
        fit(f"data.path=[{folders[1]},{folders[0]}]", "max_steps=40", "ckpt_path=last")


def test_inspect_and_verify_take_the_list(folders, capsys):
    both = f"data.path=[{folders[0]},{folders[1]}]"
    assert inspect.run(config("inspect", both), folders[0]) == 1200
    assert verify.run(config("verify", both), folders[0]) == 1200
    out = capsys.readouterr().out
    assert all(f"{folder}/train: " in out for folder in folders[:2])


def test_verify_tells_of_intact_folders_that_do_not_go_together(folders):
    with pytest.raises(UserError, match="name every folder once"):
        verify.run(config("verify", f"data.path=[{folders[0]},{folders[0]}]"), folders[0])


def test_a_list_of_nothing_and_an_unknown_answer_to_damage_are_named(fit):
    with pytest.raises(UserError, match=r"data\.path=\[\] must be a folder, a file or an address"):
        fit("data.path=[]")
    with pytest.raises(UserError, match=r"data\.on_corrupt=skip must be error or quarantine"):
        fit("data.on_corrupt=skip")


ALONE = World(1, 1, 0, False)


def by_group(group, y=None):
    with pyro.plate("groups", 4):
        level = pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(group)):
        pyro.sample("y", dist.Normal(level[group], 1.0), obs=y)


class CorruptDataError:
    """A copy of a packed table with a flipped byte in one block, another shard cut in its last, and one missing."""

    def __init__(self, whole: Path, place: Path):
        self.path = Path(shutil.copytree(whole, place))
        self.split = self.path / "train"
        index = read_index(self.split)
        first, second, third, *_ = index.shards
        flip(self.split / first.name, first.offsets["x"][1] + 700, 1)
        cut = self.split / second.name
        cut.write_bytes(cut.read_bytes()[: second.offsets["y"][-1] + 600])
        (self.split / third.name).unlink()
        b = len(first.rows)
        self.bad = {1, b + len(second.rows) - 1, *range(b + len(second.rows), b + len(second.rows) + len(third.rows))}
        self.rows = int(index.block_rows[sorted(self.bad)].sum())
        numbers = range(b + len(second.rows), b + len(second.rows) + len(third.rows))
        self.shards = {first.name: [1], second.name: [numbers[0] - 1], third.name: [*numbers]}


@pytest.fixture
def damaged(folders: list[Path], tmp_path: Path) -> CorruptDataError:
    return CorruptDataError(folders[2], tmp_path / "damaged")


@pytest.fixture
def rest(folders: list[Path], damaged: CorruptDataError, tmp_path: Path) -> Path:
    """The blocks that are intact, written anew."""
    whole = ShardFolder(folders[2] / "train")
    kept = [block for block in range(len(whole.block_rows)) if block not in damaged.bad]
    columns = {n: np.concatenate([whole.read_block(b, n) for b in kept]) for n in ("x", "y", ROW_ID)}
    write_folder(tmp_path / "rest", {n: columns[n] for n in ("x", "y")}, [int(whole.block_rows[b]) for b in kept])
    return tmp_path / "rest"


def state(run_dir: Path) -> torch.Tensor:
    return final_state(run_dir)[0].theta


def test_what_is_left_of_a_damaged_folder_is_trained_on_to_the_bit(fit, damaged, rest, tmp_path, capsys):
    options = ("stop=budget", "recipe=plain", "data.lanes=1")
    expected = fit(f"data.path={rest}", *options, run_dir=tmp_path / "expected")
    capsys.readouterr()
    found = fit(f"data.path={damaged.path}", "data.on_corrupt=quarantine", *options)
    assert torch.equal(state(found), state(expected))
    told = capsys.readouterr().out
    assert f"{damaged.rows:,} of 1,200 rows are left out, in {len(damaged.bad)} damaged blocks" in told
    assert 'block 1, column "x" does not match its hash' in told
    assert (metrics(found)["rows"], metrics(found)["rows_left_out"]) == (1200 - damaged.rows, damaged.rows)
    assert metrics(expected)["rows_left_out"] == metrics(found)["held_out_rows_left_out"] == 0
    assert metrics(found)["blocks_left_out"] == {"train": damaged.shards, "held_out": {}}
    kept = Posterior.load(found / "posterior.pt", linear)
    assert kept.index.meta["left_out"]["rows"] == damaged.rows
    assert read_index(found / "quarantine" / "train").num_rows == 1200 - damaged.rows


def test_it_goes_on_with_the_same_rows(fit, damaged, tmp_path):
    """Also where more is damaged since: that is an error when it is met, not another N."""
    options = (f"data.path={damaged.path}", "data.on_corrupt=quarantine", "stop=budget", "recipe=plain",
               "schedule=constant")  # fmt: skip
    whole = fit(*options, "max_steps=40", run_dir=tmp_path / "whole")
    fit(*options, "max_steps=20")
    shard = read_index(damaged.split).shards[-1]
    good = (damaged.split / shard.name).read_bytes()
    flip(damaged.split / shard.name, shard.offsets["x"][0] + 700)
    with pytest.raises(UserError, match=rf"{shard.name}, block \d+, column \"x\" does not match its hash"):
        fit(*options, "max_steps=40", "ckpt_path=last")
    (damaged.split / shard.name).write_bytes(good)
    assert torch.equal(state(fit(*options, "max_steps=40", "ckpt_path=last")), state(whole))


def test_an_intact_folder_is_as_it_was(fit, folders, tmp_path):
    options = (f"data.path={folders[0]}", "stop=budget", "recipe=plain")
    runs = [
        fit(*options, *more, run_dir=tmp_path / name)
        for name, more in (("plain", ()), ("checked", ("data.on_corrupt=quarantine",)))
    ]
    assert torch.equal(*map(state, runs))
    assert metrics(runs[1])["rows_left_out"] == 0
    fit(*options, "data.on_corrupt=quarantine", "max_steps=80", "ckpt_path=last", run_dir=tmp_path / "plain")


def test_of_several_folders_and_of_held_out_rows_too(fit, folders, shards, tmp_path):
    """By the names that the joined index has: 1-NAME is NAME of the second folder."""
    bad = [Path(shutil.copytree(folder, tmp_path / name)) for folder, name in ((folders[1], "bad"), (shards, "held"))]
    shard = read_index(bad[0] / "train").shards[0]
    flip(bad[0] / "train" / shard.name, shard.offsets["y"][1] + 600)
    found = metrics(fit(f"data.path=[{folders[0]},{bad[0]}]", "data.on_corrupt=quarantine"))
    assert (found["rows"], found["rows_left_out"]) == (1200 - shard.rows[1], shard.rows[1])
    assert found["blocks_left_out"]["train"] == {f"1-{shard.name}": [1]}
    index = read_index(bad[1] / "held_out")
    flip(bad[1] / "held_out" / index.shards[0].name, index.shards[0].offsets["y"][0] + 600)
    found = metrics(fit(f"data.path={bad[1]}", "data.on_corrupt=quarantine", run_dir=tmp_path / "other"))
    lost = index.shards[0].rows[0]
    assert (found["rows_left_out"], found["held_out_rows_left_out"]) == (0, lost)
    assert found["held_out_rows"] == index.num_rows - lost


def test_of_an_address_what_is_not_there_is_left_out_and_what_cannot_be_reached_is_an_error(
    fit, folders, tmp_path, monkeypatch
):
    """It may be intact, and there again tomorrow."""
    monkeypatch.setattr(remote, "_PAUSE", 0.0)
    copy = Path(shutil.copytree(folders[2], tmp_path / "copy"))
    first, second, *_ = read_index(copy / "train").shards
    (copy / "train" / second.name).unlink()
    with faulty(copy) as server:
        options = (f"data.path={server.url}", f"data.cache.dir={tmp_path}/cache", "data.on_corrupt=quarantine")
        server.faults = {first.name: ["503"] * 99}
        with pytest.raises(UserError, match=rf"{first.name} cannot be read .*: try again when the server answers"):
            fit(*options)
        server.faults = {first.name: ["flip"]}
        found = metrics(fit(*options))
    numbers = [len(first.rows) + b for b in range(len(second.rows))]
    assert found["blocks_left_out"]["train"] == {second.name: numbers}
    assert found["rows"] == 1200 - sum(second.rows)


def test_a_full_disk_leaves_nothing_out(folders, tmp_path, monkeypatch):
    """Nor does anything else that says nothing of the shards."""

    def full(*_: object) -> Any:
        raise UserError("no space is left for shards")

    folder = ShardFolder(folders[0] / "train")
    monkeypatch.setattr(folder.files, "open", full)
    with pytest.raises(UserError, match="no space is left"):
        without_damage(folder, tmp_path, ALONE, Console(quiet=True))
    assert not (tmp_path / "quarantine").exists()


def test_before_a_checkpoint_a_second_launch_looks_again(damaged, folders, tmp_path):
    """What was repaired in the meantime is taken; with a checkpoint the run has its rows, whatever has come back."""
    folder, quiet = ShardFolder(damaged.split, check=False), Console(quiet=True)
    assert without_damage(folder, tmp_path, ALONE, quiet).num_rows == 1200 - damaged.rows
    lost = read_index(damaged.split).shards[2].name
    shutil.copy(folders[2] / "train" / lost, damaged.split / lost)
    fewer = without_damage(folder, tmp_path, ALONE, quiet)
    assert 1200 - damaged.rows < fewer.num_rows < 1200
    shutil.copytree(folders[2] / "train", damaged.split, dirs_exist_ok=True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step.ckpt").touch()
    assert without_damage(folder, tmp_path, ALONE, quiet).index.digest == fewer.index.digest


def test_a_group_that_loses_all_its_rows_has_its_prior(tmp_path):
    """Group 2 lies in a block of its own, which is damaged."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(4), 100)
    write_folder(tmp_path / "all", {"group": group, "y": rng.normal(3, 1, 400).astype(np.float32)}, [100] * 4)
    shard = read_index(tmp_path / "all").shards[0]
    flip(tmp_path / "all" / shard.name, shard.offsets["group"][2] + 700)
    posterior = fit_table(
        by_group, tmp_path / "all", progress=False, options={"program": "eager", "data.on_corrupt": "quarantine"}
    )
    assert posterior.metrics["rows"] == 300
    (level,) = (site for site in posterior.summary() if site.name == "level")
    np.testing.assert_allclose(level.mean[2], 0.0, atol=0.05)
    np.testing.assert_allclose(level.sd, [0.1, 0.1, 1.0, 0.1], rtol=0.1)


def test_nothing_intact_is_an_error(fit, damaged):
    for shard in damaged.split.glob("*.tar"):
        shard.write_bytes(b"")
    with pytest.raises(UserError, match=rf"no block of {damaged.split} is intact"):
        fit(f"data.path={damaged.path}", "data.on_corrupt=quarantine")


@pytest.mark.slow
def test_two_ranks_share_the_check_and_agree(damaged, rest, tmp_path, free_port):
    """Those of torchrun, which all look at once, and those that svi launches once rank 0 has looked."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port}", "-m", "trainer")
    there = (f"data.path={damaged.path}", "data.on_corrupt=quarantine", "data.lanes=2")
    runs = {
        "expected": svi(*TRAIN, "trainer=ddp_sim", f"data.path={rest}", "data.lanes=2", f"run_dir={tmp_path}/expected"),
        "launched": svi(*TRAIN, "trainer=ddp_sim", *there, f"run_dir={tmp_path}/launched"),
        "torchrun": svi(*TRAIN, "trainer=cpu", *there, f"run_dir={tmp_path}/torchrun", launcher=torchrun),
    }
    for name, done in runs.items():
        assert done.returncode == 0, done.stderr
        assert torch.equal(state(tmp_path / name), state(tmp_path / "expected"))
    assert runs["torchrun"].stdout.count("rows are left out") == 1
