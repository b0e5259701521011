"""What a checkpoint keeps beside the tensors of a state: what the run is, and what its callbacks have come to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trainer.data.plan import Mixing, Plan
from trainer.data.remainder import EpochRemainder
from trainer.data.shards.folder import ShardFolder
from trainer.engine.datamodule import Ranks
from trainer.inference.recipe.convergence import Mark


@dataclass(frozen=True)
class PlanChoice:
    """What the rows and the noise of a step depend on: it belongs to the run, not to the launch."""

    lanes: int
    batch_size: int
    seed: int
    run_rows: int
    pool_blocks: int
    shards_together: int
    draws: int
    index: str
    """The digest of the shards' index."""
    rest: dict[str, Any] | None = None
    """What an epoch has left that was begun with another batch size or other lanes."""

    def plan(self, folder: ShardFolder) -> Plan:
        """The order of the rows of ``folder``."""
        mixing = Mixing(self.run_rows, self.pool_blocks, folder.shard_of, self.shards_together)
        rest = EpochRemainder.of(self.rest)
        return Plan(folder.block_rows, self.seed, self.lanes, self.batch_size, mixing, rest)

    def ranks(self, rank: int, size: int) -> Ranks:
        """A rank's share of it."""
        return Ranks(size, rank, self.lanes, self.draws)


@dataclass(frozen=True)
class Problem:
    """What a run trains, as it was at its last launch."""

    plan: PlanChoice
    shapes: dict[str, list[int]]
    """Of the parameters."""
    sites: list[str]
    """The names of the ELBO's terms."""
    optimizer: dict[str, Any]
    """Its options, with its `_target_`."""
    horizon: int
    """The step at which the schedule ends."""
    version: str
    world_size: int
    rounds: list[int] | None = None
    """The steps at which rounds end; None: of a version that did not say."""


@dataclass
class TrainState:
    """A run's problem and progress, shared by its callbacks."""

    problem: Problem
    seconds: float = 0.0
    """Wall seconds up to the checkpoint."""
    marks: list[Mark] = field(default_factory=list)
    """Of the segments of the round."""
    passes: int = 0
    """Over all rows, beside the epochs."""
    no_newton_at: int = 0
    """The step at which Newton steps have failed last."""
    ending: int | None = None
    """The step whose round is being ended."""
    stopped: str | None = None
    """Why training has ended before its budget."""
    evidence: dict[str, Any] | None = None
    """The evidence that the last round was judged by."""
    fineness: list[int] | None = None
    """Of the integrals over latents of rows; None: there are none, or a version that did not say."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint holds them."""
        plain = asdict(self.problem) | {each.name: getattr(self, each.name) for each in fields(self)[1:]}
        plain["plan"] = {name: value for name, value in plain["plan"].items() if value is not None or name != "rest"}
        return plain

    @classmethod
    def of(cls, content: dict[str, Any]) -> "TrainState":
        """From `state_dict`."""
        own = {each.name for each in fields(cls)}
        problem = {name: value for name, value in content.items() if name not in own}
        given = {name: value for name, value in content.items() if name in own}
        return cls(Problem(**{**problem, "plan": PlanChoice(**content["plan"])}), **given)

    def resumed(self, old: "TrainState") -> None:
        """Takes over what continues from ``old``; not the means of segments that now would end elsewhere."""
        for name in ("seconds", "passes", "no_newton_at", "ending", "stopped", "evidence", "fineness"):
            setattr(self, name, getattr(old, name))
        before, now = old.problem, self.problem
        same_rounds = before.rounds is None or before.rounds == now.rounds
        self.marks[:] = old.marks if before.plan == now.plan and same_rounds else []


def differing(one: Sequence[Any] | dict[str, Any], other: Sequence[Any] | dict[str, Any]) -> list[str]:
    """What is in only one of two lists or dicts, in words."""
    items = [set(map(str, each.items() if isinstance(each, dict) else each)) for each in (one, other)]
    return sorted(items[0] ^ items[1])
