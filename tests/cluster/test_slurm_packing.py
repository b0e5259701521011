"""A table packed by slurm/shard-array.sbatch and put together by a job that waits for it: the bytes of one process."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from slurm_tools import ROOT, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1200)]
OPTIONS = ("source=table.parquet", "block_rows=512", "shard_bytes=50000")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_parts_of_an_array_are_what_one_process_packs(slurm: Cluster):
    generator = np.random.default_rng(0)
    x, word = generator.normal(size=(20_000, 3)), generator.choice(["a", "b", "c"], 20_000)
    table = pa.table({**{f"x{k}": x[:, k] for k in range(3)}, "word": word})
    pq.write_table(table, slurm.folder / "table.parquet", row_group_size=1000)
    alone = slurm.run("svi", "shard", *OPTIONS, "out=alone")
    assert alone.returncode == 0, alone.stderr
    script = str(ROOT / "slurm" / "shard-array.sbatch")
    read = slurm.submit("--array=1-2", script, *OPTIONS, "out=together")
    made = slurm.submit("--array=1-2", f"--dependency=afterok:{read}", script, *OPTIONS, "out=together")
    wrap = ("--output=finish.log", "--wrap", "svi shard finish=true out=together")
    finish = slurm.submit(f"--dependency=afterok:{made}", *wrap)
    assert slurm.ended(finish) == {"COMPLETED"}, (slurm.folder / "finish.log").read_text()
    logs = "".join(path.read_text() for path in slurm.folder.glob("svi-shard-*.log"))
    assert "part 1 of 2" in logs
    assert "part 2 of 2" in logs
    expected = files(slurm.folder / "alone")
    assert len(expected) > 5
    assert files(slurm.folder / "together") == expected
