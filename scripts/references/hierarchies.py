"""Groups: eight schools, radon and dogs of posteriordb, claims by postcode, batting by player, births by name.

Shapes: N rows, J groups.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from scripts.references.case import Answer, Case, Rows, guide_of, posteriordb
from trainer.posterior.summary import SiteSummary


def eight_schools(school: Tensor, sigma: Tensor, y: Tensor) -> None:
    eta = pyro.sample("eta", dist.Normal(y.new_zeros(8), 1.0).to_event(1))
    mu, tau = (
        pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0)),
        pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0))),
    )
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu + tau * eta[school], sigma), obs=y)


def radon_centered(county: Tensor, y: Tensor, counties: int) -> None:
    mu = pyro.sample("mu_alpha", dist.Normal(y.new_zeros(()), 10.0))
    tau = pyro.sample("sigma_alpha", dist.HalfNormal(y.new_tensor(1.0)))
    alpha = pyro.sample("alpha", dist.Normal(mu, tau).expand([counties]).to_event(1))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(y.new_tensor(1.0)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(alpha[county], sigma), obs=y)


def radon_mn_centered(county: Tensor, y: Tensor) -> None:
    radon_centered(county, y, 85)


def radon_all_centered(county: Tensor, y: Tensor) -> None:
    radon_centered(county, y, 386)


def radon_noncentered(county: Tensor, uranium: Tensor, floor: Tensor, y: Tensor) -> None:
    raw = pyro.sample("alpha_raw", dist.Normal(y.new_zeros(85), 1.0).to_event(1))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(2), 10.0).to_event(1))
    mu = pyro.sample("mu_alpha", dist.Normal(y.new_zeros(()), 10.0))
    tau = pyro.sample("sigma_alpha", dist.HalfNormal(y.new_tensor(1.0)))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(y.new_tensor(1.0)))
    with pyro.plate("data", len(y)):
        mean = mu + tau * raw[county] + uranium * beta[0] + floor * beta[1]
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def dogs(avoided: Tensor, shocked: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(3), 100.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=beta[0] + beta[1] * avoided + beta[2] * shocked).to_event(1), obs=y)


def flights(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(x.new_zeros(8), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(10.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ b, sigma), obs=y)


def claims(x: Tensor, postcode: Tensor, exposure: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(x.new_zeros(13), 5.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(x.new_tensor(1.0)))
    u = pyro.sample("u", dist.Normal(x.new_zeros(583), tau).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson(exposure * torch.exp(x @ b + u[postcode])), obs=y)


def batting(player: Tensor, at_bats: Tensor, hits: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(at_bats.new_tensor(-1.0), 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(at_bats.new_tensor(1.0)))
    theta = pyro.sample("theta", dist.Normal(mu, tau).expand([18_220]).to_event(1))
    with pyro.plate("data", len(hits)):
        pyro.sample("hits", dist.Binomial(at_bats, logits=theta[player], validate_args=False), obs=hits)


def births(name: Tensor, year: Tensor, y: Tensor) -> None:
    b0 = pyro.sample("b0", dist.Normal(y.new_zeros(()), 10.0))
    v = pyro.sample("v", dist.Normal(y.new_zeros(131), 0.5).to_event(1))
    u = pyro.sample("u", dist.Normal(y.new_zeros(98_148), 1.2).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(b0 + v[year] + u[name], 0.8), obs=y)


def _schools(d: dict[str, Any]) -> Rows:
    return {"school": np.arange(8), **{name: np.asarray(d[name], dtype=np.float64) for name in ("sigma", "y")}}


def _radon(d: dict[str, Any]) -> Rows:
    return {"county": np.asarray(d["county_idx"]) - 1, "y": np.asarray(d["log_radon"], dtype=np.float64)}


def _radon_floors(d: dict[str, Any]) -> Rows:
    names = {"uranium": "log_uppm", "floor": "floor_measure"}
    return {**_radon(d), **{name: np.asarray(d[source], dtype=np.float64) for name, source in names.items()}}


def _dogs(d: dict[str, Any]) -> Rows:
    """A row per dog: its trials follow from each other. The last trial's own outcome is in no count."""
    y = np.asarray(d["y"], dtype=np.float64)
    before = np.pad(y, ((0, 0), (1, 0)))[:, :-1]
    trials = np.arange(y.shape[1])
    shocked = before.cumsum(1)
    return {"y": y, "shocked": shocked, "avoided": trials - shocked}


def _flights(root: Path) -> Rows:
    table = pd.read_parquet(root / "flights200k" / "data.parquet").astype(float)
    waves = [wave(2 * np.pi * k * table["time"] / 24) for k in (1, 2, 3) for wave in (np.sin, np.cos)]
    x = np.column_stack([np.ones(len(table)), table["distance"] / 1000 - 0.7, *waves])
    return {"x": x, "y": table["delay"].to_numpy() / 10}


def _flights_answer(root: Path) -> Answer:
    r = json.loads((root / "flights200k" / "reference.json").read_text())
    loc, scale = [*r["mf_loc"], r["mf_log_sigma_loc"]], [*r["mf_scale"], r["mf_log_sigma_scale"]]
    return Answer(np.array(loc), np.array(scale), r["mf_elbo"], np.ones(9, dtype=bool))


def _claims(root: Path) -> Rows:
    t = pd.read_parquet(root / "bemtpl97" / "data.parquet")
    postcodes = np.load(root / "bemtpl97" / "reference_params.npz")["postcode"]
    age, bm = (t["ageph"] - 47) / 15, t["bm"] / 10
    numbers = [age, age**2, bm, bm**2, np.log(t["power"].clip(lower=1)) - 4, (t["agec"].clip(upper=30) - 7) / 5]
    levels = [("coverage", "TPL+"), ("coverage", "TPL++"), ("sex", "male"), ("fuel", "diesel"), ("use", "work")]
    dummies = [(t[name].astype(str) == level).astype(float) for name, level in levels]
    fleet = t["fleet"].astype(str).isin(["1", "Y", "True"]).astype(float)
    return {
        "x": np.column_stack([np.ones(len(t)), *numbers, *dummies, fleet]).astype(np.float64),
        "postcode": np.searchsorted(postcodes, t["postcode"].to_numpy()),
        "exposure": t["expo"].to_numpy(),
        "y": t["nclaims"].to_numpy().astype(np.float64),
    }


def _claims_answer(root: Path) -> Answer:
    r = json.loads((root / "bemtpl97" / "reference.json").read_text())
    z = np.load(root / "bemtpl97" / "reference_params.npz")
    loc = np.concatenate([r["mf_loc_b"], [r["mf_log_tau_loc"]], z["u_loc"]])
    scale = np.concatenate([r["mf_scale_b"], [r["mf_log_tau_scale"]], z["u_scale"]])
    return Answer(loc, scale, r["mf_elbo"], np.arange(len(loc)) < 14)


def _batting(root: Path) -> Rows:
    t = pd.read_parquet(root / "lahman_batting" / "data.parquet")
    players = np.load(root / "lahman_batting" / "reference_params.npz")["player"]
    return {
        "player": np.searchsorted(players, t["playerID"].to_numpy().astype(str)),
        "at_bats": t["AB"].to_numpy().astype(np.float64),
        "hits": t["H"].to_numpy().astype(np.float64),
    }


def _batting_answer(root: Path) -> Answer:
    r = json.loads((root / "lahman_batting" / "reference.json").read_text())
    z = np.load(root / "lahman_batting" / "reference_params.npz")
    loc = np.concatenate([[r["mu_loc"], r["log_tau_loc"]], z["loc"]])
    scale = np.concatenate([[r["mu_scale"], r["log_tau_scale"]], z["scale"]])
    return Answer(loc, scale, r["mf_elbo"], np.arange(len(loc)) < 2)


def _births(root: Path) -> Rows:
    t = pd.read_parquet(root / "babynames" / "data.parquet")
    keys = np.load(root / "babynames" / "reference_params.npz")["keys"]
    names = pd.Index(keys).get_indexer(t["name"].astype(str) + "|" + t["sex"].astype(str))
    if (names < 0).any():
        raise ValueError("a name of the table is not among the reference's keys")
    return {"name": names, "year": t["year"].to_numpy() - 1880, "y": np.log(t["births"].to_numpy())}


def _births_answer(root: Path) -> Answer:
    r = json.loads((root / "babynames" / "reference.json").read_text())
    z = np.load(root / "babynames" / "reference_params.npz")
    (b0, *v), (b0_sd, *v_sd) = z["b0v_mean"], z["b0v_sd_mf"]
    loc = np.concatenate([b0 + np.array(v), z["u_mean"]])
    scale = np.concatenate([np.hypot(b0_sd, v_sd), z["u_sd_mf"]])
    return Answer(loc, scale, r["mf_elbo"], np.arange(len(loc)) < len(v))


def _births_judged(sites: Sequence[SiteSummary]) -> tuple[np.ndarray, np.ndarray]:
    """b0 + v by year, since b0 and the mean of v can stand in for each other; then u."""
    by = {site.name: site for site in sites}
    b0, v, u = (by[name] for name in ("b0", "v", "u"))
    return np.concatenate([b0.loc + v.loc, u.loc]), np.concatenate([np.hypot(b0.scale, v.scale), u.scale])


def _radon_order(sites: Sequence[SiteSummary]) -> tuple[np.ndarray, np.ndarray]:
    """The answer lists the counties first."""
    by = {site.name: site for site in sites}
    return guide_of([by[name] for name in ("alpha", "mu_alpha", "sigma_alpha", "sigma_y")])


_GOLD, _OTHER = "posteriordb", "posteriordb_nogold"
CASES = (
    posteriordb("eight schools", f"{_GOLD}/eight_schools-eight_schools_noncentered", eight_schools, _schools,
        np.log(2),
    ),
    posteriordb(
        "radon mn centered", f"{_OTHER}/radon_mn-radon_partially_pooled_centered", radon_mn_centered, _radon,
        2 * np.log(2), judged=_radon_order,
    ),
    posteriordb(
        "radon mn non-centered", f"{_OTHER}/radon_mn-radon_hierarchical_intercept_noncentered", radon_noncentered,
        _radon_floors, 2 * np.log(2),
    ),
    posteriordb(
        "radon all centered", f"{_OTHER}/radon_all-radon_partially_pooled_centered", radon_all_centered, _radon,
        2 * np.log(2), judged=_radon_order,
    ),
    posteriordb("dogs", f"{_OTHER}/dogs-dogs", dogs, _dogs),
    Case("flights200k", flights, _flights, _flights_answer),
    Case("bemtpl97", claims, _claims, _claims_answer),
    Case("lahman_batting", batting, _batting, _batting_answer),
    Case("babynames", births, _births, _births_answer, judged=_births_judged),
)  # fmt: skip
