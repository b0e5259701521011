"""A `VariationalModule` in your own Lightning trainer: the result of `svi train`, and stock tools of Lightning."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import app_models
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import pytorch_lightning as pl
import torch
from app_tools import HERE, final_state, svi
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from trainer import ShardData, UserError, VariationalModule
from trainer.data.packing.pack import pack

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of Lightning
OPTIONS = {"program": "eager"}


def stock(folder: Path, **options: Any) -> pl.Trainer:
    """A trainer as a user makes one, on one CPU."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, **{**quiet, "devices": 1, **options})


def module(**options: Any) -> VariationalModule:
    return VariationalModule(app_models.linear, options={**OPTIONS, **options}, progress=False)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({}, 6), ({"estimator": "anchor"}, 4), ({"stop": "budget", "optimizer.lr": 0.01, "schedule": "constant"}, 3)],
)
def test_theta_is_that_of_svi_train(fit, shards, tmp_path, options, epochs):
    own = stock(tmp_path, max_epochs=epochs)
    made = module(**options)
    own.fit(made, ShardData(shards, batch_size=256))
    run = fit(f"max_epochs={epochs}", "max_steps=null", *(f"{name}={value}" for name, value in options.items()))
    state, _ = final_state(run)
    assert made.step == int(state.step)
    assert torch.equal(made.state.theta, state.theta)
    assert torch.equal(made.theta, state.average)


SCRIPT = """
import sys, torch, pytorch_lightning as pl
import app_models
from trainer import ShardData, VariationalModule
torch.set_num_threads(1)
shards, out = sys.argv[1:]
module = VariationalModule(app_models.linear, options={"program": "eager"}, progress=False)
own = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=4, logger=False, enable_progress_bar=False,
                 enable_checkpointing=False, enable_model_summary=False)
own.fit(module, ShardData(shards, batch_size=256))
if own.is_global_zero:
    torch.save([module.state.theta, module.theta], out)
"""


@pytest.mark.slow
def test_theta_on_two_devices_is_that_of_svi_train(shards, tmp_path):
    script, out = tmp_path / "own.py", tmp_path / "theta.pt"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, str(script), str(shards), str(out)], env=env, capture_output=True, text=True,
                          timeout=240, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    of_verb = svi("train", "model._target_=app_models.linear", f"data.path={shards}", "batch_size=256", "max_epochs=4",
                  "trainer=cpu", "trainer.devices=2", "threads=1", "program=eager", f"run_dir={run}")  # fmt: skip
    assert of_verb.returncode == 0, of_verb.stderr
    theta, average = torch.load(out, weights_only=True)
    state, _ = final_state(run)
    assert torch.equal(theta, state.theta)
    assert torch.equal(average, state.average)


def test_a_resumed_run_is_the_uninterrupted_one(shards, tmp_path):
    whole = module()
    stock(tmp_path / "whole", max_epochs=6).fit(whole, ShardData(shards, batch_size=256))
    saved = ModelCheckpoint(tmp_path / "saved", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    stock(tmp_path / "first", max_epochs=6, callbacks=[saved]).fit(module(), ShardData(shards, batch_size=256))
    for path in (tmp_path / "saved" / "epoch=1.ckpt", tmp_path / "saved" / "epoch=4.ckpt"):
        again = module()
        stock(tmp_path / "again", max_epochs=6).fit(again, ShardData(shards, batch_size=256), ckpt_path=path)
        assert again.step == whole.step
        assert torch.equal(again.theta, whole.theta)


def test_a_checkpoint_gives_the_posterior(shards, tmp_path):
    saved = ModelCheckpoint(tmp_path, save_last=True)
    made = module()
    stock(tmp_path, max_epochs=3, callbacks=[saved]).fit(made, ShardData(shards, batch_size=256))
    loaded = VariationalModule.load_from_checkpoint(saved.last_model_path, model=app_models.linear)
    one, other = made.posterior(), loaded.posterior()
    assert torch.equal(one.theta, other.theta)
    assert {site.name for site in other.summary()} == {site.name for site in one.summary()}
    drawn, again = one.sample(5), other.sample(5)
    assert all(np.array_equal(drawn[name], again[name]) for name in drawn)
    with pytest.raises(UserError, match=r"no posterior yet: call trainer\.fit"):
        module().posterior()


def test_stock_callbacks_and_loggers_work(shards, tmp_path):
    logger = CSVLogger(tmp_path / "log")
    stops = EarlyStopping("elbo_per_row", mode="max", patience=1, min_delta=100.0)
    callbacks = [stops, LearningRateMonitor(), Timer("00:01:00:00")]
    own = stock(tmp_path, max_epochs=9, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    made = module(stop="budget")
    own.fit(made, ShardData(shards, batch_size=256))
    assert stops.stopped_epoch
    assert made.step < made.update.horizon
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    assert {"elbo_per_row", "learning_rate", "lr-SGD"} <= set(header)
    steps = [int(float(row.split(",")[header.index("step")])) for row in rows[1:]]
    assert max(steps) == made.step


def test_validation_and_prediction_take_the_rows_held_out(table, tmp_path):
    train, _ = pack(str(table), tmp_path / "shards", block_rows=128, held_out=0.2)
    own, made, data = stock(tmp_path, max_epochs=4), module(), ShardData(tmp_path / "shards", batch_size=256)
    own.fit(made, data)
    (found,) = own.validate(made, data, verbose=False)
    final = made.posterior().metrics
    assert found["val_elbo_per_row"] == pytest.approx(final["held_out_elbo_per_row"], abs=0.02)
    parts = own.predict(made, data)
    assert sum(len(part["y"].mean) for part in parts) == 3000 - train.num_rows
    assert np.isfinite(np.concatenate([part["y"].mean for part in parts])).all()


class Rows(Dataset):
    """x and y of a regression."""

    def __init__(self, count: int):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 2, generator=generator)
        self.y = self.x @ torch.tensor([1.0, -2.0]) + 0.5 * torch.randn(count, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[row], "y": self.y[row]}


def regression(x, y=None):
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(2), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 0.5), obs=y)


def test_any_loader_of_dicts_works(tmp_path):
    data = Rows(2000)
    torch.manual_seed(1)
    train, held_out = DataLoader(data, 200, shuffle=True), DataLoader(Rows(500), 100)
    made = VariationalModule(regression, num_obs=len(data), progress=False)
    own = stock(tmp_path, max_epochs=30)
    own.fit(made, train, held_out)
    precision = data.x.double().T @ data.x.double() / 0.25 + torch.eye(2) / 100
    exact = torch.linalg.solve(precision, data.x.double().T @ data.y.double() / 0.25)
    (site,) = made.posterior().summary()
    sd = precision.diagonal().rsqrt()
    assert np.abs((site.mean - exact.numpy()) / sd.numpy()).max() < 0.2
    assert np.allclose(site.sd, sd, rtol=0.05)
    assert "val_elbo_per_row" in own.callback_metrics
    parts = own.predict(made, held_out)
    assert sum(len(part["y"].mean) for part in parts) == 500


def test_options_of_the_guide_hold_over_a_loader(tmp_path):
    made = VariationalModule(
        regression,
        num_obs=200,
        progress=False,
        options={"guide.init_scale": 0.25, "start": "zero", "optimizer.lr": 1e-9},
    )
    stock(tmp_path, max_epochs=1).fit(made, DataLoader(Rows(200), 100))
    (site,) = made.posterior().summary()
    assert np.allclose(site.sd, 0.25)


def test_an_encoder_holds_latents_of_rows_over_a_loader(tmp_path):
    def effects(x, y):
        b = pyro.sample("b", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x @ b + u, 0.5), obs=y)

    options = {"guide.rows": "amortise", "guide.widths": [4]}
    made = VariationalModule(effects, num_obs=200, progress=False, options=options)
    own = stock(tmp_path, max_epochs=1)
    own.fit(made, DataLoader(Rows(200), 100))
    found = made.posterior().latents({"x": Rows(20).x.numpy(), "y": Rows(20).y.numpy()}, draws=10)
    assert found["u"].mean.shape == (20,)


@pytest.mark.parametrize(
    ("options", "loader", "said"),
    [
        ({}, DataLoader(Rows(10), 5), r"num_obs= is missing"),
        ({"num_obs": 10}, DataLoader([torch.zeros(2)] * 10, 5), r"gives Tensor where dicts of tensors belong"),
        (
            {"num_obs": 10, "options": {"objective": "iw"}},
            DataLoader(Rows(10), 10),
            r"objective=renyi weights draws by all rows, and a loader's batch has some: leave objective=elbo",
        ),
    ],
)
def test_what_cannot_be_has_a_sentence(tmp_path, options, loader, said):
    with pytest.raises(UserError, match=said):
        stock(tmp_path, max_epochs=1).fit(VariationalModule(regression, progress=False, **options), loader)


def test_an_unknown_option_has_a_sentence(shards, tmp_path):
    with pytest.raises(UserError, match=r"option optimiser is unknown"):
        stock(tmp_path, max_epochs=1).fit(module(optimiser="adam"), ShardData(shards))
