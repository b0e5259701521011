"""Stochastic variational inference for Pyro models on tables of any size: `fit`, and what it gives, a `Posterior`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.data.shards.folder import ShardFolder
    from trainer.errors import UserError
    from trainer.posterior.posterior import Posterior
    from trainer.training.lightning import VariationalModule
    from trainer.training.shard_data import ShardData
    from trainer.verbs.fit import fit

__all__ = ["Posterior", "ShardData", "ShardFolder", "UserError", "VariationalModule", "fit"]
_HOMES = {
    "fit": "trainer.verbs.fit",
    "Posterior": "trainer.posterior.posterior",
    "ShardFolder": "trainer.data.shards.folder",
    "VariationalModule": "trainer.training.lightning",
    "ShardData": "trainer.training.shard_data",
    "UserError": "trainer.errors",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
