"""What the tests of the models share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor


def log_joint(model: Callable[..., Any], sites: dict[str, Any], columns: dict[str, Any]) -> Tensor:
    """log p(data, sites) [] in nats, through Pyro."""
    values = {name: v if isinstance(v, Tensor) else torch.as_tensor(np.asarray(v)) for name, v in sites.items()}
    data = {name: torch.as_tensor(column) for name, column in columns.items()}
    trace = poutine.trace(poutine.condition(model, values)).get_trace(**data)
    assert values.keys() <= trace.nodes.keys()
    return trace.log_prob_sum()


def latents(model: Callable[..., Any], columns: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each latent site."""
    trace = poutine.trace(model).get_trace(**{name: torch.as_tensor(column) for name, column in columns.items()})
    names = [name for name in trace.stochastic_nodes if name not in trace_plates(trace)]
    return {name: tuple(trace.nodes[name]["value"].shape) for name in names}


def trace_plates(trace: poutine.Trace) -> set[str]:
    """The names of the plates."""
    return {frame.name for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ())}


def draw(model: Any, rows: int, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(truth, columns of ``rows`` rows)."""
    generator = np.random.default_rng(seed)
    truth = model.truth(generator)
    return truth, model.rows(truth, generator, 0, rows)


def in_dtype(columns: dict[str, np.ndarray], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """The columns as tensors, floats as ``dtype``."""
    tensors = {name: torch.as_tensor(column, device=device) for name, column in columns.items()}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def check_dtype_and_device(model: Any, columns: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    """Every site has the dtype of the columns and stays on their device; without y the model draws one per row."""
    rows = len(columns["y"])
    inputs = {name: column for name, column in columns.items() if name != "y"}
    for device in ("cpu", "meta"):  # meta refuses a tensor that is left on the cpu, and any .item()
        # validation branches on values, which meta tensors have not
        with pyro.validation_enabled(device == "cpu"):
            for given in (columns, inputs):
                trace = poutine.trace(model).get_trace(**in_dtype(given, dtype, device))
                trace.compute_log_prob()
                sites = {n: trace.nodes[n] for n in trace.nodes if "log_prob" in trace.nodes[n]}
                sites = {n: site for n, site in sites.items() if n not in trace_plates(trace)}
                assert {site["value"].dtype for site in sites.values()} == {dtype}
                assert {site["log_prob"].dtype for site in sites.values()} == {dtype}
                assert {site["value"].device.type for site in sites.values()} == {device}
                assert sites["y"]["value"].shape == sites["y"]["log_prob"].shape == (rows,)
                assert sites["y"]["is_observed"] == ("y" in given)


def check_rows_are_reproducible(model: Any) -> None:
    """The same generator gives the same truth and rows; floats are float32; the truth is keyed by the latent sites."""
    truth, columns = draw(model, 100)
    again, same = draw(model, 100)
    assert all(np.array_equal(truth[name], again[name]) for name in truth)
    assert all(np.array_equal(columns[name], same[name]) for name in columns)
    assert not np.array_equal(columns["y"], draw(model, 100, seed=1)[1]["y"])
    assert {column.dtype for name, column in columns.items() if name != "group"} == {np.dtype("float32")}
    assert {len(column) for column in columns.values()} == {100}
    assert latents(model, columns) == {name: np.shape(value) for name, value in truth.items()}
