"""Regressions of posteriordb. The models are those of the table in the data's README; flat priors are ImproperUniform.

Shapes: N rows, D features.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
from torch import Tensor
from torch.distributions import constraints

from scripts.references.case import Rows, posteriordb


def flat(*shape: int) -> Any:
    return dist.ImproperUniform(constraints.real, (), shape)


def flat_scale() -> Any:
    return dist.ImproperUniform(constraints.positive, (), ())


def linear(x: Tensor, y: Tensor, coefficients: Any, scale: Any) -> None:
    beta = pyro.sample("beta", coefficients)
    sigma = pyro.sample("sigma", scale)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def blr(x: Tensor, y: Tensor) -> None:
    d = x.shape[-1]
    linear(x, y, dist.Normal(x.new_zeros(d), 10.0).to_event(1), dist.HalfNormal(x.new_tensor(10.0)))


def flat_linear(x: Tensor, y: Tensor) -> None:
    linear(x, y, flat(x.shape[-1]), flat_scale())


def cauchy_linear(x: Tensor, y: Tensor) -> None:
    linear(x, y, flat(x.shape[-1]), dist.HalfCauchy(x.new_tensor(2.5)))


def kilpisjarvi(x: Tensor, y: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Normal(x.new_tensor(9.31290322580645), 100.0))
    beta = pyro.sample("beta", dist.Normal(x.new_tensor(0.0), 0.0333333333333333))
    sigma = pyro.sample("sigma", flat_scale())
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def diamonds(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, x.new_tensor(8.0), 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, x.new_tensor(0.0), 10.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(intercept + x @ b, sigma), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    alpha = pyro.sample("alpha", flat())
    beta = pyro.sample("beta", flat(x.shape[-1]))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=alpha + x @ beta), obs=y)


def binomial(year: Tensor, count: Tensor, of: Tensor) -> None:
    alpha, one, two = (pyro.sample(n, dist.Normal(year.new_tensor(0.0), 100.0)) for n in ("alpha", "beta1", "beta2"))
    with pyro.plate("data", len(year)):
        logits = alpha + one * year + two * year**2
        pyro.sample("count", dist.Binomial(of, logits=logits, validate_args=False), obs=count)


def columns(*values: Any) -> np.ndarray:
    """[N, D]: an intercept, then each of ``values``."""
    arrays = [np.asarray(value, dtype=np.float64) for value in values]
    return np.column_stack([np.ones(len(arrays[0])), *arrays])


def _z(value: Any, sds: float) -> np.ndarray:
    array = np.asarray(value, dtype=np.float64)
    return (array - array.mean()) / (sds * array.std(ddof=1))


def _regression(outcome: str, *names: str) -> Callable[[dict[str, Any]], Rows]:
    return lambda d: {"x": columns(*(d[name] for name in names)), "y": np.asarray(d[outcome], dtype=np.float64)}


def _mesquite(d: dict[str, Any]) -> Rows:
    names = ("diam1", "diam2", "canopy_height", "total_height", "density")
    return {"x": columns(*(np.log(d[name]) for name in names), d["group"]), "y": np.log(d["weight"])}


def _mesquite_volume(d: dict[str, Any]) -> Rows:
    volume = np.log(np.asarray(d["diam1"]) * np.asarray(d["diam2"]) * np.asarray(d["canopy_height"]))
    return {"x": columns(volume), "y": np.log(d["weight"])}


def _kidiq_interaction(d: dict[str, Any]) -> Rows:
    hs, iq = _z(d["mom_hs"], 2.0), _z(d["mom_iq"], 2.0)
    return {"x": columns(hs, iq, hs * iq), "y": np.asarray(d["kid_score"], dtype=np.float64)}


def _earnings(d: dict[str, Any]) -> Rows:
    z, male = _z(d["height"], 1.0), np.asarray(d["male"], dtype=np.float64)
    return {"x": columns(z, male, z * male), "y": np.log(d["earn"])}


def _nes(d: dict[str, Any]) -> Rows:
    age = np.asarray(d["age_discrete"])
    ages = [(age == level).astype(float) for level in (2, 3, 4)]
    x = columns(d["real_ideo"], d["race_adj"], *ages, d["educ1"], d["gender"], d["income"])
    return {"x": x, "y": np.asarray(d["partyid7"], dtype=np.float64)}


def _plain(d: dict[str, Any]) -> Rows:
    return {"x": np.asarray(d["X"], dtype=np.float64), "y": np.asarray(d["y"], dtype=np.float64)}


def _single(d: dict[str, Any]) -> Rows:
    return {"x": np.asarray(d["x"], dtype=np.float64), "y": np.asarray(d["y"], dtype=np.float64)}


def _diamonds(d: dict[str, Any]) -> Rows:
    x = np.asarray(d["X"], dtype=np.float64)[:, 1:]
    return {"x": x - x.mean(0), "y": np.asarray(d["Y"], dtype=np.float64)}


def _wells(*names: str) -> Callable[[dict[str, Any]], Rows]:
    def data(d: dict[str, Any]) -> Rows:
        raw = {name: np.asarray(d[name], dtype=np.float64) for name in ("dist", "arsenic", "assoc", "educ")}
        distance, arsenic = (raw["dist"] - raw["dist"].mean()) / 100, raw["arsenic"] - raw["arsenic"].mean()
        made = {
            "dist100": raw["dist"] / 100,
            "arsenic": raw["arsenic"],
            "c_dist100": distance,
            "c_arsenic": arsenic,
            "inter": distance * arsenic,
            "assoc": raw["assoc"],
            "educ4": raw["educ"] / 4,
        }
        return {"x": np.column_stack([made[name] for name in names]), "y": np.asarray(d["switched"], dtype=np.float64)}

    return data


def _income(d: dict[str, Any]) -> Rows:
    return {"x": np.asarray(d["income"], dtype=np.float64)[:, None], "y": np.asarray(d["vote"], dtype=np.float64)}


def _glm(d: dict[str, Any]) -> Rows:
    names = {"year": "year", "count": "C", "of": "N"}
    return {name: np.asarray(d[source], dtype=np.float64) for name, source in names.items()}


_LOG2 = math.log(2)
_GOLD, _OTHER = "posteriordb", "posteriordb_nogold"
CASES = (
    posteriordb("sblri-blr", f"{_GOLD}/sblri-blr", blr, _plain, _LOG2),
    posteriordb("sblrc-blr", f"{_GOLD}/sblrc-blr", blr, _plain, _LOG2),
    posteriordb(
        "kidiq momhs", f"{_GOLD}/kidiq-kidscore_momhs", cauchy_linear, _regression("kid_score", "mom_hs"), _LOG2
    ),
    posteriordb(
        "kidiq interaction", f"{_GOLD}/kidiq_with_mom_work-kidscore_interaction_z", flat_linear, _kidiq_interaction
    ),
    posteriordb("earnings", f"{_GOLD}/earnings-logearn_interaction_z", flat_linear, _earnings),
    posteriordb("mesquite volume", f"{_GOLD}/mesquite-logmesquite_logvolume", flat_linear, _mesquite_volume),
    posteriordb("mesquite", f"{_GOLD}/mesquite-logmesquite", flat_linear, _mesquite),
    posteriordb("nes1980", f"{_GOLD}/nes1980-nes", flat_linear, _nes),
    posteriordb("kilpisjarvi", f"{_GOLD}/kilpisjarvi_mod-kilpisjarvi", kilpisjarvi, _single, stress=True),
    posteriordb("diamonds", f"{_GOLD}/diamonds-diamonds", diamonds, _diamonds, stress=True),
    posteriordb("nes logit", f"{_OTHER}/nes_logit_data-nes_logit_model", logistic, _income),
    posteriordb(
        "wells dist100ars", f"{_OTHER}/wells_data-wells_dist100ars_model", logistic, _wells("dist100", "arsenic")
    ),
    posteriordb(
        "wells daae_c",
        f"{_OTHER}/wells_data-wells_daae_c_model",
        logistic,
        _wells("c_dist100", "c_arsenic", "inter", "assoc", "educ4"),
    ),
    posteriordb("binomial", f"{_OTHER}/GLM_Binomial_data-GLM_Binomial_model", binomial, _glm),
)
