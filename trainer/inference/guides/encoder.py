"""A network from the columns of a row to the mean and the log sd of its latents, made for whatever columns there are.

Numbers are standardized, codes have a table of vectors, sparse rows pass a sparse first layer, and the entries of
ragged columns a layer of their own before they are summed (Zaheer et al., "Deep sets", NeurIPS 2017). What the columns
look like is taken from the first rows, and kept beside the parameters.

Shapes: B rows, M entries, H the first width, d numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from trainer.errors import UserError
from trainer.inference.model.ragged import Column, Csr, Jagged

Facts = Mapping[str, Mapping[str, Any]]
"""By column: ``levels`` (how many codes), ``mean`` and ``sd`` (of numbers, each a list), ``scale`` and ``entries`` (of
sparse rows: of a value, and how many a row has), ``of`` and ``entries`` (of ragged ones: the first column of equal
lengths, and how many a row has).
"""
_FEW = 32  # codes, below which whole numbers have a table too
_MOST = 10.0  # of a log sd
_START = 0.1  # of the last layer


def facts_of(columns: Mapping[str, Column], known: Facts) -> dict[str, dict[str, Any]]:
    """What an encoder has to know of ``columns``, beside what is ``known``. Raises UserError where there are none."""
    if not columns:
        raise UserError("guide.rows=amortise needs columns of the row to encode, and the model takes none.")
    found: dict[str, dict[str, Any]] = {}
    for name, column in columns.items():
        own = dict(known.get(name, {}))
        values = column.values[: int(column.offsets[-1])] if isinstance(column, Jagged) else column
        if isinstance(column, Csr):
            own.setdefault("scale", float(values.double().square().mean().sqrt().nan_to_num()) or 1.0)
        elif not own.keys() & {"levels", "mean"}:
            own |= _of_numbers(values)
        if isinstance(column, Jagged):
            own.setdefault("entries", max(1.0, len(values) / len(column)))
            alike = (each for each in columns if _aligned(columns[each], column))
            own.setdefault("of", next(alike))
        found[name] = own
    return found


def _aligned(one: Column, other: Jagged) -> bool:
    """Whether both have the same entries in each row."""
    return isinstance(one, Jagged) and type(one) is type(other) and torch.equal(one.offsets, other.offsets)


def _of_numbers(values: Tensor) -> dict[str, Any]:
    each = values.double()
    sd, mean = each.std(0, unbiased=False).nan_to_num(), each.mean(0).nan_to_num()
    found: dict[str, Any] = {"mean": mean.flatten().tolist(), "sd": torch.where(sd > 0, sd, 1.0).flatten().tolist()}
    if not values.is_floating_point() and values.dim() == 1 and len(values):
        low, high = (int(end) for end in values.long().aminmax())
        if low >= 0 and high < _FEW:
            found["levels"] = high + 1
    return found


@dataclass(frozen=True)
class Encoder:
    """From columns with ``facts`` to ``size`` numbers of a row, through layers of ``widths``."""

    facts: Facts
    widths: Sequence[int]
    size: int
    """d."""

    def init(self, columns: Mapping[str, Column], like: Tensor) -> dict[str, Tensor]:
        """Its parameters at the start, of the type of ``like``, drawn from torch's generator."""
        first, found = self.widths[0], {}

        def layer(name: str, inputs: int, outputs: int, shrunk: float = 1.0) -> None:
            found[f"guide.rows.{name}.weight"] = shrunk * torch.randn(inputs, outputs).to(like) / math.sqrt(inputs)
            found[f"guide.rows.{name}.bias"] = like.new_zeros(outputs)

        for name, fact in self.facts.items():
            share = 1 / math.sqrt(len(self.facts))
            places = len(fact.get("mean", ())) or math.prod(columns[name].shape[1:] if _is_dense(columns[name]) else ())
            if "levels" in fact:
                table = torch.randn(places * (fact["levels"] + 1), first)
                found[f"guide.rows.{name}.table"] = (share / math.sqrt(places)) * table.to(like)
            if "mean" in fact:
                found[f"guide.rows.{name}.weight"] = (share / math.sqrt(places)) * torch.randn(places, first).to(like)
            if "scale" in fact:
                weight = torch.randn(columns[name].width, first).to(like)
                found[f"guide.rows.{name}.weight"] = (share / math.sqrt(fact["entries"])) * weight
        for group in self._groups:
            layer(f"entries of {group}", first, first)
            found[f"guide.rows.each of {group}.bias"] = like.new_zeros(first)
        found["guide.rows.0.bias"] = like.new_zeros(first)
        for number, (inputs, outputs) in enumerate(zip(self.widths, self.widths[1:]), 1):
            layer(str(number), inputs, outputs)
        layer("end", self.widths[-1], 2 * self.size, _START)
        return found

    @property
    def _groups(self) -> dict[str, list[str]]:
        """The ragged columns, by the first of those with the same entries."""
        found: dict[str, list[str]] = {}
        for name, fact in self.facts.items():
            if "of" in fact and "scale" not in fact:
                found.setdefault(fact["of"], []).append(name)
        return found

    def __call__(self, params: Mapping[str, Tensor], columns: Mapping[str, Column]) -> tuple[Tensor, Tensor]:
        """The means and the log sds, [B, d] both."""
        own = {name.removeprefix("guide.rows."): each for name, each in params.items()}
        hidden = own["0.bias"]
        for name, fact in self.facts.items():
            if "scale" in fact:
                hidden = hidden + (columns[name] @ own[f"{name}.weight"]) / fact["scale"]
            elif "of" not in fact:
                hidden = hidden + _first(own, name, fact, columns[name])
        for group, names in self._groups.items():
            each = own[f"each of {group}.bias"]
            for name in names:
                each = each + _first(own, name, self.facts[name], columns[name].values)
            summed = columns[group].total(silu(each)) / self.facts[group]["entries"]
            weight, bias = (own[f"entries of {group}.{part}"] for part in ("weight", "bias"))
            hidden = hidden + summed @ weight + bias
        for number in range(1, len(self.widths)):
            hidden = silu(hidden) @ own[f"{number}.weight"] + own[f"{number}.bias"]
        mean, log_sd = (silu(hidden) @ own["end.weight"] + own["end.bias"]).split(self.size, dim=-1)
        return mean, _MOST * (log_sd / _MOST).tanh()


def _is_dense(column: Column) -> bool:
    return not isinstance(column, Jagged)


def _first(own: Mapping[str, Tensor], name: str, fact: Mapping[str, Any], values: Tensor) -> Tensor:
    """What rows or entries ``values`` [K, ...] of a column add to their first layer, [K, H]."""
    parts: list[Tensor] = []
    flat = values.reshape(len(values), -1)
    if "levels" in fact:
        codes = flat.long().clamp(0, fact["levels"])  # one beyond those that are known stands for all others
        at = codes + torch.arange(codes.shape[1], device=codes.device) * (fact["levels"] + 1)
        parts.append(own[f"{name}.table"][at].sum(1))
    if "mean" in fact:
        weight = own[f"{name}.weight"]
        mean, sd = (torch.tensor(fact[each], dtype=weight.dtype, device=weight.device) for each in ("mean", "sd"))
        parts.append(((flat.to(weight.dtype) - mean) / sd) @ weight)
    return torch.stack(parts).sum(0)
