"""Discrete latents of rows: summed out, and their states given what is observed.

A trace holds the sites of the rows, each with its ``log_prob`` at every state of the discrete ones (Pyro's parallel
enumeration). Tensor variable elimination (Obermeyer et al., ICML 2019) sums them out at a cost linear in the length of
a Markov chain. The derivative of log p(y) by what is added to the log-probability of a state is the probability of that
state given y; the same elimination backward draws from all of them jointly.

Shapes: B rows, K states of a site, n the sizes of the plates that it stands in, from the left, the rows among them.
"""

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from pyro import poutine
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from pyro.ops.einsum.adjoint import require_backward
from pyro.ops.packed import pack
from pyro.ops.rings import LogRing, SampleRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import Message
from torch import Tensor

from trainer.inference.model.latents import Site
from trainer.inference.rows.sites import frames_of

NONE: Mapping[str, Tensor] = MappingProxyType({})


class Enumerated(EnumMessenger):
    """Pyro's, which looks at the shape of a value in a way that `torch.vmap` refuses."""

    def _pyro_post_sample(self, msg: Message[..., Any]) -> None:
        value: Any = msg["value"]
        if isinstance(value, Tensor):
            msg["value"] = torch.empty(value.shape, device="meta")
        super()._pyro_post_sample(msg)
        msg["value"] = value


class _Ring(LogRing):
    """Pyro's, in operations that `torch.vmap` takes."""

    _backend = "trainer.inference.rows.log_einsum"


class States(NamedTuple):
    """Of a discrete site."""

    values: Tensor
    """[K, event]."""
    plates: tuple[int, ...]
    """n."""
    axis: int
    """Which of the plates the rows are."""

    def by_row(self, tensor: Tensor) -> Tensor:
        """``tensor`` [..., n] as [B, ..., other plates], what stands before the plates after the rows."""
        return tensor.movedim(self.axis - len(self.plates), 0)


def summed_out(trace: poutine.Trace, plate: str, rows: int, tilts: Mapping[str, Tensor] = NONE) -> Tensor:
    """log of the sum over the states of each row, [B]; ``tilts``: by site [K, n], added to the log-probability of each
    of its states.
    """
    tree, states, _ = _factors(trace, tilts)
    symbol = trace.plate_to_symbol[plate]
    ring = _Ring(dim_to_size={symbol: rows})  # a packed tensor has no axis of one row
    found: Tensor = contract_to_tensor(tree, states, frozenset([symbol]), ring=ring)
    return found.expand(rows) if found.dim() == 0 else found


def states_of(trace: poutine.Trace, plate: str) -> dict[str, States]:
    """The discrete sites of the rows."""
    found = {}
    for name, site in _enumerated(trace).items():
        frames = frames_of(site)
        axis = [frame.name for frame in frames].index(plate)
        values = site["fn"].enumerate_support(expand=False)
        events = values.shape[values.dim() - len(site["fn"].event_shape) :]
        found[name] = States(values.reshape(-1, *events), tuple(frame.size for frame in frames), axis)
    return found


def drawn_states(trace: poutine.Trace) -> dict[str, Tensor]:
    """A draw of the discrete sites given what is observed, jointly, by torch's own generator: int64 [n] of each site,
    the numbers of its states.
    """
    sites, zeros = _enumerated(trace), {}
    for name, site in sites.items():
        count = len(site["fn"].enumerate_support(expand=False))
        zeros[name] = site["log_prob"].new_zeros(count, *(frame.size for frame in frames_of(site)))
    tree, states, queries = _factors(trace, zeros)
    sizes = {dim: size for terms in tree.values() for term in terms for dim, size in zip(_dims(term), term.shape)}
    for query in queries.values():
        require_backward(query)
    for terms in contract_tensor_tree(tree, states, ring=SampleRing(dim_to_size=sizes)).values():
        for term in terms:
            if hasattr(term, "_pyro_backward"):
                term._pyro_backward()
    return {name: _own_state(queries[name], site) for name, site in sites.items()}


def _factors(
    trace: poutine.Trace, tilts: Mapping[str, Tensor]
) -> tuple[OrderedDict[frozenset[str], list[Tensor]], set[str], dict[str, Tensor]]:
    """The packed log-probabilities by the plates that they stand in, the symbols of the states, and those of ``tilts``,
    which are among the former.
    """
    trace.symbolize_dims()
    symbols = trace.plate_to_symbol
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    added = {}
    for name, site in _sites(trace).items():
        terms = tree.setdefault(frozenset(symbols[frame.name] for frame in frames_of(site)), [])
        terms.append(pack(site["log_prob"], site["infer"]["_dim_to_symbol"]))
        if name in tilts:
            added[name] = pack(_unpacked(tilts[name], site), site["infer"]["_dim_to_symbol"])
            terms.append(added[name])
    return tree, set(trace.symbol_to_dim) - set(symbols.values()), added


def _dims(packed: Tensor) -> str:
    found: str = packed._pyro_dims  # type: ignore[attr-defined]
    return found


def _enumerated(trace: poutine.Trace) -> dict[str, Site]:
    return {name: site for name, site in _sites(trace).items() if site["infer"].get("_enumerate_dim") is not None}


def _sites(trace: poutine.Trace) -> dict[str, Site]:
    return cast(dict[str, Site], trace.nodes)


def _unpacked(tilt: Tensor, site: Site) -> Tensor:
    """[K, n] with the axes that Pyro gives them."""
    shape = [1] * -site["infer"]["_enumerate_dim"]
    shape[0] = len(tilt)
    for frame, size in zip(frames_of(site), tilt.shape[1:]):
        shape[frame.dim] = size
    return tilt.reshape(shape)


def _own_state(query: Tensor, site: Site) -> Tensor:
    """The number of the site's state [n], once the elimination has gone backward to its ``query``."""
    frames, drawn = frames_of(site), getattr(query, "_pyro_backward_result", None)
    sizes = [frame.size for frame in frames]
    symbol, of_plates = site["infer"]["_enumerate_symbol"], site["infer"]["_dim_to_symbol"]
    if drawn is None:  # one state
        return torch.zeros(sizes, dtype=torch.int64, device=query.device)
    dims = drawn._pyro_dims[1:]
    own = drawn[drawn._pyro_sample_dims.index(symbol)]
    order = [dims.index(of_plates[frame.dim]) for frame in frames if frame.size > 1]
    found: Tensor = own.permute(order).reshape(sizes)
    return found
