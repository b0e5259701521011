"""`svi train`, `svi predict` and `svi verify` of a folder that a server gives."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from app_tools import config
from servers import faulty

from trainer.engine import checkpoint
from trainer.errors import UserError
from trainer.verbs import predict, verify


@pytest.fixture
def server(shards):
    with faulty(shards) as made:
        yield made


def theta_of(run_dir):
    return checkpoint.load(checkpoint.newest(run_dir / "checkpoints"))[0].theta


def test_a_run_from_a_server_is_that_from_the_folder(fit, server, shards, tmp_path):
    here = fit("max_steps=30", run_dir=tmp_path / "here")
    place = (f"data.path={server.url}", f"data.cache.dir={tmp_path}/cache")
    server.faults = {"index.json": ["503"], "000002.tar": ["drop", "flip"]}
    far = fit("max_steps=30", *place, run_dir=tmp_path / "far")
    assert torch.equal(theta_of(here), theta_of(far))
    for one, other in zip(*(json.loads((run / "metrics.json").read_text()).items() for run in (here, far))):
        assert one[0] in ("seconds", "rows_per_second") or one == other
    for run, data in ((here, (f"data.path={shards}",)), (far, place)):
        predict.run(config("predict", f"run={run}", *data, f"out={run}/p.parquet", "draws=5"), run)
    assert pq.read_table(here / "p.parquet").equals(pq.read_table(far / "p.parquet"))


def test_a_cache_too_small_for_all_shards_takes_few_at_a_time(fit, server, shards, tmp_path):
    """The plan remembers it: a run that goes on elsewhere, with room for all, reads the same rows."""
    limit = sum(file.stat().st_size for file in (shards / "train").glob("*.tar"))
    options = (f"data.path={server.url}", f"data.cache.dir={tmp_path}/cache", f"data.cache.bytes={limit}")
    run_dir = fit("max_steps=10", *options)
    assert checkpoint.load(checkpoint.newest(run_dir / "checkpoints"))[1]["plan"]["shards_together"] == 8
    fit("max_steps=20", "ckpt_path=last", f"data.path={shards}")
    assert checkpoint.load(checkpoint.newest(run_dir / "checkpoints"))[1]["plan"]["shards_together"] == 8


def test_verify_of_a_server(server, tmp_path, capsys):
    options = (f"data.path={server.url}", f"data.cache.dir={tmp_path}/cache")
    rows = verify.run(config("verify", *options), tmp_path)
    assert rows == 3000
    assert f"{server.url}/train: " in capsys.readouterr().out
    for cached in (tmp_path / "cache").glob("*.tar"):
        cached.unlink()
    server.faults = {"000001.tar": ["flip"] * 9}
    with pytest.raises(SystemExit) as ended:
        verify.run(config("verify", *options), tmp_path)
    assert ended.value.code == 1
    assert "/train/000001.tar does not match its sha256, block 0 of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"), [("bytes=0", "must be a whole"), ("timeout=-1", "must be a number above 0")]
)
def test_settings_that_cannot_be_are_named(fit, server, setting, said):
    with pytest.raises(UserError, match=f"data.cache.{setting} {said}"):
        fit(f"data.path={server.url}", f"data.cache.{setting}")
