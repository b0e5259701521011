"""`svi shard` as a user runs it: every kind of table, what it reports, bad input, killed and run again."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from app_tools import svi

from trainer import cli
from trainer.data.shards.files import read_index
from trainer.data.shards.folder import open_split
from trainer.models.linear import LinearRegression

ROWS = 2000


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    """t.parquet, t.csv and t.npz in the current folder, which is empty otherwise."""
    generator = np.random.default_rng(0)
    a, b, c = generator.normal(size=(3, ROWS)).astype(np.float32)
    team = generator.choice(["red", "blue", "green"], ROWS)
    frame = pd.DataFrame({"a": a, "b": b, "c": c, "target": a - b, "team": team, "id": np.arange(ROWS) // 10})
    return frame


@pytest.fixture
def here(table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `table` in it in three formats."""
    monkeypatch.chdir(tmp_path)
    table.to_parquet("t.parquet")
    table.to_csv("t.csv", index=False)
    np.savez("t.npz", **{name: table[name].to_numpy() for name in ("a", "b", "c", "target")})
    return tmp_path


@pytest.fixture
def shard(here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`shard("source=...", ...)`: the command, in this process."""

    def run(*overrides: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["svi"])
        code = 0
        try:
            cli.main(["shard", *overrides])
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Done(code, *capsys.readouterr())

    return run


def rows_of(out: str) -> dict[str, np.ndarray]:
    """All rows of both splits, sorted by row id."""
    folders = [folder for split in ("train", "held_out") if (folder := open_split(Path(out), split))]
    names = [column.name for column in folders[0].index.columns]
    blocks = [(folder, block) for folder in folders for block in range(len(folder.block_rows))]
    columns = {name: np.concatenate([f.read_block(block, name) for f, block in blocks]) for name in names}
    order = np.argsort(columns["row_id"])
    return {name: values[order] for name, values in columns.items()}


def summary(out: str) -> str:
    """The last two lines that the command printed."""
    return "\n".join(out.splitlines()[-2:])


@pytest.mark.parametrize("source", ["t.parquet", "t.csv", "t.npz", "t.par*"])
def test_every_format_gives_the_same_rows(shard, table, source):
    done = shard(f"source={source}", "columns.x=[a,b,c]", "columns.y=target", "out=packed")
    assert done.code == 0, done.err
    rows = rows_of("packed")
    assert np.array_equal(rows["x"], table[["a", "b", "c"]].to_numpy())
    assert np.allclose(rows["y"], table["target"], rtol=1e-6)
    train, held_out = (read_index(Path("packed", split)).num_rows for split in ("train", "held_out"))
    assert train + held_out == ROWS
    columns = "columns: x float32[3] · y float32"
    assert summary(done.out) == f"packed: {train:,} rows to train on, {held_out} held out\n{columns}"


def test_without_columns_every_column_keeps_its_name_and_text_becomes_codes(shard, table):
    done = shard("source=t.csv", "out=packed")
    assert summary(done.out).endswith(
        "\ncolumns: a float32 · b float32 · c float32 · target float32 · team 3 categories · id int64"
    )
    assert np.array_equal(rows_of("packed")["team"], table["team"].map({"blue": 0, "green": 1, "red": 2}))


def test_a_synthetic_table_comes_with_its_truth(shard):
    done = shard("source=synthetic", "model=linear", "model.features=3", "rows=1e4", "out=made", "split.held_out=0")
    assert done.code == 0, done.err
    assert "made: 10,000 rows to train on, 0 held out" in done.out
    assert not Path("made/held_out").exists()
    truth = json.loads(Path("made/truth.json").read_text())
    drawn = LinearRegression(features=3).truth(np.random.default_rng(0))
    assert truth == {name: np.asarray(value).tolist() for name, value in drawn.items()}
    assert len(rows_of("made")["y"]) == 10_000


def test_groups_categories_and_standardizing_by_one_name(shard, table):
    done = shard("source=t.parquet", "columns.y=target", "group_by=id", "standardise=y", "out=packed")  # as of 0.1
    assert done.code == 0, done.err
    assert summary(done.out).endswith("\ncolumns: y float32[10] · length int64")
    assert read_index(Path("packed/train")).meta["standardised"].keys() == {"y"}
    assert len(rows_of("packed")["y"]) == ROWS // 10


def test_dropped_rows_are_counted(shard, table):
    table.loc[[3, 70, 71], "a"] = np.nan
    table.to_csv("gaps.csv", index=False)
    refused = shard("source=gaps.csv", "out=packed")
    assert (refused.code, "no value for 'a' in row 3" in refused.err) == (2, True)
    done = shard("source=gaps.csv", "out=packed", "missing=drop")
    assert ", 3 dropped for missing values" in done.out
    assert set(range(ROWS)) - set(rows_of("packed")["row_id"]) == {3, 70, 71}


def test_a_log_file_gets_plain_lines_that_count_to_the_end(shard):
    lines = shard("source=synthetic", "model=linear", "rows=50000", "out=packed").out.splitlines()[:-2]
    assert len(lines) >= 5
    counts = [re.fullmatch(r"packing ([\d,]+)/50,000 rows  [\d,]+ rows/s", line) for line in lines]
    assert all(counts), lines
    numbers = [int(count[1].replace(",", "")) for count in counts if count]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 50_000


def test_a_terminal_gets_a_bar_with_rows_speed_and_time_left(shard, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    done = shard("source=t.parquet", "out=packed")
    bar = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.out)
    assert re.search(r"packing \S+ 2,000 rows [\d,]+ rows/s \d:\d\d:\d\d", bar), bar
    assert "packing 2,000/" not in bar


def test_a_long_path_stays_on_one_line(shard):
    out = "/".join(["[red]a_folder_with_a_long_name"] * 5)
    done = shard("source=t.parquet", f"out='{out}'")
    assert summary(done.out).startswith(f"{out}: ")


BAD = {
    "source=t.csv": "no output folder was given: add out=DIR.",
    "out=packed": "no table was given: add source=PATH",
    "source=nowhere.parquet out=packed": "no file at 'nowhere.parquet'",
    "source=empty.csv out=packed": "'empty.csv' has no rows",
    "source=nothing.csv out=packed": "cannot read 'nothing.csv': Empty CSV file",
    "source=t.csv out=packed columns.y=targt": "has no column 'targt': do you mean target?",
    "source=t.csv out=packed columns.y=5": "has no column '5'",
    "source=t.csv out=packed columns.x=[a,team]": "'team' in columns.x holds text; give it a column of its own",
    "source=t.csv out=packed columns.x.y=a": "columns.x={y:a} must be a source column, or several as [a,b].",
    "source=stray.csv out=packed columns.y=target": "('?' in row 41, '0' in row 0, counted from 0): fix it",
    "source=stray.csv out=packed columns.x=[a,target]": "'target' of 'stray.csv' holds text and numbers ('?' in row 41",
    "source=nan.parquet out=packed": "no value for 'a' in row 7 (counted from 0): fill it in, or",
    "source=infinite.csv out=packed missing=drop": "column 'a' is infinite, or too large for float64, in row 8",
    "source=t.csv out=old": "'old' exists: choose another out=, or write overwrite=true.",
    "source=t.csv out=old overwrite=true": "'old' is not a packed folder, and is not overwritten",
    "source=t.csv out=packed overwrite=no": "overwrite=no must be true or false.",
    "source=t.csv out=t.npz/packed": "cannot write 't.npz/packed'",
    "source=t.csv out=packed seed=abc": "seed=abc must be a whole number from 0 to 2**63 - 1.",
    "source=t.csv out=packed block_rows=1.5": "block_rows=1.5 must be a whole number from 1 up.",
    "source=t.csv out=packed split.held_out=half": "split.held_out=half must be a number from 0 and below 1.",
    "source=t.csv out=packed split.held_out=1": "split.held_out=1 must be a number from 0 and below 1.",
    "source=t.csv out=packed missing=skip": "missing=skip must be error or drop.",
    "source=t.csv out=packed group_by=a": "group_by=a is not a column of integers or text",
    "source=t.csv out=packed standardize=team": "standardize=team names no column of floats",
    "source=synthetic out=packed model=linear": "a synthetic table needs a size: add rows=1000000.",
    "source=synthetic out=packed rows=10": "no model was given",
    "source=synthetic out=packed rows=ten model=linear": "rows=ten must be a whole number from 1 up, or null.",
    "source=t.csv out=packed part=3": "part=3 must be a part and their number, as 3/16, or null.",
    "source=t.csv out=packed part=3/2": "part=3/2 is not a part: write part=1/2 to part=2/2.",
    "source=t.csv out=packed workers=0": "workers=0 must be a whole number from 1 to 1,024, or null.",
    "source=t.csv out=packed workers=two": "workers=two must be a whole number from 1 to 1,024, or null.",
    "out=packed finish=true": "there are no parts in",
    "out=packed finish=true part=1/2": "part= and finish=true are two steps",
    "source=synthetic out=packed rows=10 model=linear seed=-3": "seed=-3 must be a whole number from 0 to 2**63 - 1.",
    "source=synthetic out=packed rows=10 model._target_=app_models.linear": "cannot make rows",
}


@pytest.mark.parametrize(("overrides", "sentence"), BAD.items(), ids=list(BAD))
def test_bad_input_is_one_sentence_and_leaves_nothing(shard, here, table, overrides, sentence):
    Path("empty.csv").write_text("a,target\n")
    Path("nothing.csv").write_text("")
    Path("stray.csv").write_text("a,target\n" + "".join(f"{i / 2},{'?' if i == 41 else i}\n" for i in range(100)))
    for name, row, value in (("nan.parquet", 7, np.nan), ("infinite.csv", 8, np.inf)):
        bad = table.copy()
        bad.loc[row, "a"] = value
        bad.to_parquet(name) if name.endswith("parquet") else bad.to_csv(name, index=False)
    Path("old").mkdir()
    Path("old/notes.txt").write_text("mine")
    before = sorted(here.rglob("*"))
    done = shard(*overrides.split())
    assert done.code == 2
    assert done.err.startswith("svi shard: ")
    assert done.err.count("\n") == 1
    assert sentence in done.err
    assert "Traceback" not in done.out
    assert sorted(here.rglob("*")) == before


def test_a_stray_word_is_named_by_its_row_in_a_long_table(shard):
    Path("long.csv").write_text("y\n" + "1.5\n" * 70_000 + "lost\n")
    done = shard("source=long.csv", "out=packed")
    assert done.code == 2
    assert "'lost' in row 70000, '1.5' in row 0, counted from 0" in done.err


def test_words_and_numbers_are_categories_where_it_is_said(shard):
    Path("codes.csv").write_text("icd,y\n250,1\nV27,2\n250,3\n")
    done = shard("source=codes.csv", "out=packed", "categories=icd", "split.held_out=0")
    assert done.code == 0, done.err
    assert rows_of("packed")["icd"].tolist() == [0, 1, 0]


def test_debug_shows_the_traceback(shard):
    done = shard("source=nowhere.csv", "out=packed", "debug=true")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "UserError: no file at 'nowhere.csv'" in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_stopped_in_the_middle_it_clears_up_and_says_so(shard, here, number):
    common = ("source=synthetic", "rows=50000", "out=packed", "model._target_=app_models.Dying")
    before, handler = sorted(here.iterdir()), signal.getsignal(number)
    died = shard(*common, f"model.number={int(number)}", "model.at=30000")
    assert died.code == 128 + number
    assert died.err == f"svi shard: stopped by {number.name}; nothing was packed.\n"
    assert sorted(here.iterdir()) == before
    assert signal.getsignal(number) is handler
    assert shard(*common, "model.number=0", "model.at=-1").code == 0
    assert sorted(path.name for path in here.iterdir()) == sorted([*(path.name for path in before), "packed"])


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_nothing_that_looks_packed_and_runs_again(here, shard):
    common = ("source=synthetic", "rows=50000", f"out={here}/packed", "model._target_=app_models.Dying")
    before = {path.name for path in here.iterdir()}
    died = svi("shard", *common, f"model.number={int(signal.SIGKILL)}", "model.at=30000")
    assert died.returncode == -signal.SIGKILL
    left = {path.name for path in here.iterdir()} - before
    assert all(name.startswith(".packed.partial-") for name in left), left
    assert not list(here.rglob("index.json"))
    done = shard(*common, "model.number=0", "model.at=-1")
    assert done.code == 0, done.err
    assert {path.name for path in here.iterdir()} - before == {"packed"}


@pytest.fixture
def small_disk(here: Path):
    """A disk of 300 kB."""
    disk = here / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk]).returncode:
        pytest.skip("needs root that may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_one_sentence_and_is_cleared(shard, small_disk):
    done = shard("source=synthetic", "model=linear", "rows=50000", f"out={small_disk}/packed")
    assert done.code == 2
    assert f"no space is left on the disk of '{small_disk}/packed'" in done.err
    assert done.err.count("\n") == 1
    assert not list(small_disk.iterdir())


def test_parts_and_finish_give_what_one_command_does(shard, here):
    common = ("source=t.parquet", "columns.x=[a,b,c]", "columns.y=target", "standardize=x", "seed=3")
    assert shard(*common, "out=one").code == 0
    early = shard(*common, "out=packed", "part=1/2")
    assert early.code == 0, early.err
    assert summary(early.out) == "part 1 of 2: 0 rows read · 1 of 2 parts to come"
    missing = shard("finish=true", "out=packed")
    assert missing.code == 2
    assert "of the 2 parts in '" in missing.err
    assert "these are missing: 2; run each again with part=NUMBER/2, then finish=true." in missing.err
    last = shard(*common, "out=packed", "part=2/2")
    assert last.out.splitlines()[-1].startswith("part 2 of 2: 2,000 rows read · ")
    again = shard(*common, "out=packed", "part=2/2")
    assert summary(again.out).startswith("part 2 of 2: read before · 0 shards made")
    done = shard("finish=true", "out=packed")
    assert done.code == 0, done.err
    assert summary(done.out).startswith("packed: ")
    for path in Path("one").rglob("*.*"):
        assert Path("packed", path.relative_to("one")).read_bytes() == path.read_bytes()
    assert not Path("packed.parts").exists()


def test_a_synthetic_table_in_parts_keeps_its_truth(shard, here):
    common = ("source=synthetic", "model=linear", "rows=300000")
    assert shard(*common, "out=one").code == 0
    for part in (1, 2):
        done = shard(*common, "out=packed", f"part={part}/2")
        assert done.code == 0, done.err
        assert re.search(rf"^reading part {part} of 2 [\d,]+/[\d,]+ rows", done.out, re.MULTILINE)
    assert shard("finish=true", "out=packed").code == 0
    files = sorted(str(path.relative_to("one")) for path in Path("one").rglob("*") if path.is_file())
    assert "truth.json" in files
    assert all(Path("packed", file).read_bytes() == Path("one", file).read_bytes() for file in files)


def test_a_part_that_gets_a_signal_says_what_to_do_and_leaves_the_others(shard, here):
    common = ("source=synthetic", "rows=50000", "out=packed", "model._target_=app_models.Dying")
    assert shard(*common, "part=1/2", "model.number=0", "model.at=-1").code == 0
    died = shard(*common, "part=2/2", f"model.number={int(signal.SIGTERM)}", "model.at=30000")
    assert died.code == 128 + signal.SIGTERM
    assert died.err == "svi shard: stopped by SIGTERM; start part=2/2 again: it does what is left of it.\n"
    assert not list(Path("packed.parts").glob(".part-*"))
    assert shard(*common, "part=2/2", "model.number=0", "model.at=-1").code == 0
    assert shard("finish=true", "out=packed").code == 0
