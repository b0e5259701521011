"""`svi export`: draws that ArviZ reads, with names; the guide's parameters that safetensors reads."""

import json

import arviz
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from app_tools import config
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import load_file

from trainer import fit as fit_here
from trainer.errors import UserError
from trainer.posterior.export import save_guide, to_inference_data
from trainer.verbs import export


def by_group(x, group, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(x.new_tensor(1.0)))
    shift = pyro.param("shift", x.new_zeros(()))
    with pyro.plate("groups", 3):
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + level[group] + shift, spread), obs=y)


@pytest.fixture(scope="module")
def posterior():
    rng = np.random.default_rng(0)
    names = rng.choice(["north", "south", "west"], 200)
    data = pd.DataFrame(
        {"a": rng.normal(size=200), "b": rng.normal(size=200), "group": names, "y": rng.normal(size=200)}
    )
    columns = {"x": ["a", "b"], "group": "group", "y": "y"}
    options = {"program": "eager", "slots": 64}
    return fit_here(by_group, data, columns=columns, max_steps=30, progress=False, options=options)


def test_dimensions_have_the_names_of_the_columns(posterior):
    draws = to_inference_data(posterior, 50)["posterior"]
    assert draws["level"].dims == ("chain", "draw", "group")
    assert draws["level"].coords["group"].values.tolist() == ["north", "south", "west"]
    assert draws["w"].coords["x_part"].values.tolist() == ["a", "b"]
    assert draws["spread"].dims == ("chain", "draw")
    np.testing.assert_array_equal(draws["level"].values[0], posterior.sample(50)["level"])


def test_the_guides_parameters(posterior, tmp_path):
    save_guide(posterior, tmp_path / "guide.safetensors")
    found = load_file(tmp_path / "guide.safetensors")
    facts = json.loads((tmp_path / "guide.json").read_text())
    assert facts["sites"] == {"w": [2], "spread": [], "level": [3]}
    assert facts["columns"] == {"group": ["north", "south", "west"]}
    for site in posterior.summary():
        if "@" not in site.name:
            assert np.allclose(found[f"{site.name}.loc"], site.loc)
            assert np.allclose(found[f"{site.name}.scale"], site.scale)
    assert found["shift"].shape == torch.Size([])
    assert set(found) == {f"{s}.{p}" for s in ("w", "spread", "level") for p in ("loc", "scale")} | {"shift"}


def test_the_command(fit, tmp_path):
    run_dir = fit("max_steps=20")
    export.run(config("export", f"run={run_dir}", f"out={tmp_path / 'draws.nc'}", "draws=9"), run_dir)
    assert arviz.from_netcdf(tmp_path / "draws.nc")["posterior"]["w"].shape == (1, 9, 3)
    export.run(config("export", f"run={run_dir}", f"out={tmp_path / 'guide.safetensors'}"), run_dir)
    assert set(load_file(tmp_path / "guide.safetensors")) == {
        "w.loc", "w.scale", "sigma.loc", "sigma.scale",
    }  # fmt: skip
    for out, message in (("a.txt", "of no known format"), ("no/a.nc", "make it first")):
        with pytest.raises(UserError, match=message):
            export.run(config("export", f"run={run_dir}", f"out={tmp_path / out}"), run_dir)


def test_another_guide_has_no_table_of_parameters(tmp_path):
    data = {"x": np.random.default_rng(0).normal(size=(40, 2)), "group": np.arange(40) % 3, "y": np.zeros(40)}
    options = {"program": "eager", "slots": 64}
    posterior = fit_here(by_group, data, AutoNormal, max_steps=2, progress=False, options=options)
    with pytest.raises(UserError, match="only a Gaussian guide"):
        save_guide(posterior, tmp_path / "guide.safetensors")
