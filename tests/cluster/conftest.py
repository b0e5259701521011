"""One Slurm for all tests here, and a table packed once."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from slurm_tools import Cluster, cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With `shards/`, 4,000 rows of a logistic regression, in its folder."""
    folder = tmp_path_factory.mktemp("cluster")
    with cluster(folder) as made:
        done = made.run("svi", "shard", "source=synthetic", "model=logistic", "rows=4000", "out=shards")
        assert done.returncode == 0, done.stderr
        yield made
