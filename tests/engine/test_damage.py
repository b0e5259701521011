"""CorruptDataError shards as a user meets them: `svi verify` names all of them, `svi train` ends with one sentence."""

import os
import shutil
from pathlib import Path

import pytest
from app_tools import config, svi

from trainer.data.shards.files import read_index
from trainer.errors import UserError
from trainer.verbs import verify


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards to damage; blocks of 128 rows, several in a shard."""
    return Path(shutil.copytree(shards, tmp_path / "linear"))


def flip_in_the_last_block(split: Path) -> tuple[Path, int]:
    """Flips a byte of the last block's `x`; returns its shard and the block's number."""
    index = read_index(split)
    path = split / index.shards[-1].name
    data = bytearray(path.read_bytes())
    data[index.shards[-1].offsets["x"][-1] + 1000] ^= 1
    path.write_bytes(data)
    return path, len(index.block_rows) - 1


def test_intact_shards_are_reported_and_counted(shards, capsys):
    assert verify.run(config("verify", f"data.path={shards}"), shards) == 3000
    out = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("checking ")]
    assert [line.split(":")[0] for line in out] == [f"{shards}/train", f"{shards}/held_out"]
    assert all(line.endswith("rows are intact") for line in out)
    held_out = read_index(shards / "held_out").num_rows
    assert verify.run(config("verify", f"data.path={shards / 'held_out'}"), shards) == held_out


@pytest.mark.slow
def test_verify_names_every_bad_shard_of_both_splits_and_exits_with_1(folder):
    path, block = flip_in_the_last_block(folder / "train")
    missing = folder / "train" / "000000.tar"
    missing.unlink()
    other, other_block = flip_in_the_last_block(folder / "held_out")
    done = svi("verify", f"data.path={folder}")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"svi verify: shard {missing} is missing: copy it back, or pack the table again.",
        *(
            f'svi verify: shard {shard}, block {number}, column "x" does not match its hash: '
            "copy the shard again, pack the table again, or leave the block out (data.on_corrupt=quarantine, in a new "
            "run_dir)."
            for shard, number in ((path, block), (other, other_block))
        ),
    ]
    assert "; 2 damaged" in done.stdout


def test_verify_of_a_damaged_or_lost_index_exits_with_1_and_of_no_folder_with_2(folder, capsys):
    (folder / "train" / "index.json").write_text("{")
    (folder / "held_out" / "index.json").unlink()
    with pytest.raises(SystemExit) as ended:
        verify.run(config("verify", f"data.path={folder}"), folder)
    assert ended.value.code == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "train/index.json is not readable JSON" in first
    assert "held_out/index.json is missing" in second
    (folder / "train" / "index.json").unlink()
    for path in (folder, folder / "nowhere", folder / "train" / "000000.tar"):
        with pytest.raises(UserError, match="is not a shard folder: it holds no"):
            verify.run(config("verify", f"data.path={path}"), folder)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [["trainer=cpu", "data.lanes=1"], ["trainer=ddp_sim", "data.lanes=2"]], ids=[1, 2])
def test_training_meets_a_flipped_byte_on_its_way(folder, tmp_path, ranks):
    """On two ranks one of them meets it, and both leave with that sentence, told once."""
    path, block = flip_in_the_last_block(folder / "train")
    died = svi(
        "train", "model._target_=app_models.linear", f"data.path={folder}", "batch_size=256", "max_steps=60", "slots=2",
        "program=eager", "threads=1", f"run_dir={tmp_path}/run", *ranks,
    )  # fmt: skip
    assert died.returncode == 2, died.stderr
    assert died.stderr.strip() == (
        f'svi train: shard {path}, block {block}, column "x" does not match its hash: '
        "copy the shard again, pack the table again, or leave the block out (data.on_corrupt=quarantine, in a new "
        "run_dir)."
    )


@pytest.mark.parametrize("damage", ["truncated", "missing", "index"])
def test_training_does_not_start_on_a_damaged_folder(fit, folder, tmp_path, damage):
    shard = folder / "train" / "000001.tar"
    if damage == "truncated":
        os.truncate(shard, 10)
    elif damage == "missing":
        shard.unlink()
    else:
        (folder / "train" / "index.json").write_text("[]")
    with pytest.raises(UserError, match=r"index\.json is not an index|000001\.tar (has 10 bytes|is missing)"):
        fit(f"data.path={folder}")
    assert not (tmp_path / "run").exists()
