"""Runs whose latents of rows an encoder holds, from the command line: trained, resumed, asked for latents, exported."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from app_tools import WEIGHTS, config

from trainer.data.packing.pack import pack
from trainer.inference.estimates import full_elbo
from trainer.posterior import summary
from trainer.training.finished import posterior_of
from trainer.verbs import export, latents, predict, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    x = generator.normal(size=(90, 3))
    np.savez(folder / "table.npz", x=x, y=x @ WEIGHTS + 4 * (generator.random(90) < 0.5))
    pack(str(folder / "table.npz"), folder / "shards", block_rows=32)
    return folder / "shards"


def trained(run_dir, data, *words):
    options = ["model._target_=app_models.effects", "guide.rows=amortise", "guide.widths=[8]", f"data.path={data}"]
    rest = ["trainer=cpu", "threads=1", "program=eager", "batch_size=32", "stop=budget", f"run_dir={run_dir}"]
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as few:
        few.setattr(full_elbo, "_PAIRS", 8)
        few.setattr(full_elbo, "_KL_DRAWS", 20)
        few.setattr(summary, "_DRAWS", 20)
        train.run(config("train", *options, *rest, *words), run_dir)
    torch.set_default_dtype(before)


def test_a_run_is_resumed_and_used(data, tmp_path, capsys):
    """Stopped after a checkpoint at step 4 of 8, it goes on to the same parameters."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained(whole, data, "max_steps=8", "checkpoint.every_n_steps=4", "checkpoint.keep_last=5")
    assert "with an encoder for u of each row" in " ".join(capsys.readouterr().out.split())
    (first,) = [each for each in (whole / "checkpoints").glob("*.ckpt") if each.stem.endswith("4")]
    trained(cut, data, "max_steps=8", f"ckpt_path={first}")
    one, two = (posterior_of(run_dir, ["app_models"]) for run_dir in (whole, cut))
    assert torch.equal(one.theta, two.theta)
    assert one.inference.rows.facts == two.inference.rows.facts
    for verb, name in ((latents, "latents"), (predict, "predict")):
        out = tmp_path / f"{name}.parquet"
        verb.run(config(name, f"run={whole}", f"data.path={data}", f"out={out}", "draws=8"), whole)
        assert pq.read_table(out).num_rows > 0
    assert {"u_mean", "k_p1"} < set(pq.read_table(tmp_path / "latents.parquet").column_names)
    export.run(config("export", f"run={whole}", f"out={tmp_path / 'draws.nc'}", "draws=10"), whole)
    assert (tmp_path / "draws.nc").is_file()
