"""One Slurm for all tests here, and a table packed once."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from slurm_tools import Cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """With `shards/`, 4,000 rows of a logistic regression, in its folder."""
    found = os.environ.get("SVI_SLURM")
    if found != "up":
        pytest.skip(found or "needs Slurm: ./scripts/cluster_test brings one up, as root on Debian 12")
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    done = made.run("svi", "shard", "source=synthetic", "model=logistic", "rows=4000", "out=shards")
    assert done.returncode == 0, done.stderr
    return made
