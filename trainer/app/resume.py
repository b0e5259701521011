"""What a run fixes at its first launch, and what must be the same when it goes on.

The plan (lanes, batch size, seed) and the number of draws belong to the run, not to the launch: they come from the
checkpoint where there is one, so that another world size reads the same rows with the same noise.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from trainer.app.ranks import World
from trainer.data.plan import default_lanes
from trainer.data.reader import ShardFolder
from trainer.errors import UserError
from trainer.lit import checkpoint
from trainer.lit.datamodule import Ranks
from trainer.svi.step import State

Saved = tuple[State, dict[str, Any]]


def saved(ckpt_path: str | None, run_dir: Path) -> Saved | None:
    """The checkpoint to go on from: `last` is the newest complete one of ``run_dir``, or None where none was saved."""
    if ckpt_path is None:
        if any((run_dir / "checkpoints").glob("*.ckpt")):
            raise UserError(f"{run_dir} holds a run already: continue it with ckpt_path=last, or give another run_dir=")
        return None
    if ckpt_path == "last":
        path = checkpoint.newest(run_dir / "checkpoints")
        return None if path is None else checkpoint.load(path)
    if "://" in ckpt_path:
        raise UserError(f"ckpt_path={ckpt_path} is a URL: copy the checkpoint and its .json to this machine first.")
    return checkpoint.load(Path(ckpt_path))


def plan_facts(cfg: DictConfig, folder: ShardFolder, world: World, old: Saved | None) -> dict[str, Any]:
    """Lanes, batch size, seed, runs and draws of the plan: the checkpoint's, or those of a fresh run."""
    batch_size = min(int(cfg.batch_size), folder.num_rows)
    if batch_size < 1:
        raise UserError(f"batch_size={cfg.batch_size} must be at least 1.")
    fresh: dict[str, Any] = {
        "lanes": int(cfg.data.lanes or default_lanes(batch_size, world.size, folder.num_rows)),
        "batch_size": batch_size,
        "seed": int(cfg.seed),
        "run_rows": int(cfg.data.run_rows),
        "pool_blocks": int(cfg.data.pool_blocks),
        "draws": int(cfg.draws or world.size),
        "index": folder.index.digest,
    }
    if old is None:
        facts = fresh
    else:
        facts = dict(old[1]["plan"])
        if facts["index"] != fresh["index"]:
            raise UserError(
                f"the checkpoint was trained on other data than {cfg.data.path} (index {facts['index'][:12]} is not "
                f"{fresh['index'][:12]}): give the same shards, or start a new run_dir."
            )
        for key in ("batch_size", "seed"):
            if facts[key] != fresh[key]:
                raise UserError(
                    f"the checkpoint was trained with {key}={facts[key]}, not {fresh[key]}: "
                    f"give {key}={facts[key]}, or start a new run_dir."
                )
    _refuse_uneven(facts["lanes"], facts["draws"], world.size)
    return facts


def _refuse_uneven(lanes: int, draws: int, ranks: int) -> None:
    if lanes % ranks:
        raise UserError(f"lanes({lanes}) % ranks({ranks}) != 0: use a world size that divides {lanes}, or data.lanes=.")
    if lanes % draws:
        raise UserError(f"lanes({lanes}) % draws({draws}) != 0: choose draws= that divides {lanes}, or data.lanes=.")
    if ranks % draws and draws % ranks:
        raise UserError(
            f"draws({draws}) and ranks({ranks}): one must divide the other; choose draws= or the world size."
        )


def check_same(old: dict[str, Any], new: dict[str, Any], state: State, fresh: State) -> None:
    """Raises UserError where a checkpoint belongs to another model, guide or optimiser."""
    for what in ("sites", "shapes"):
        if old[what] != new[what]:
            differ = sorted(str(x) for x in set(map(str, _items(old[what]))) ^ set(map(str, _items(new[what]))))
            raise UserError(
                f"the checkpoint belongs to another model or guide: its {what} differ in {', '.join(differ[:6])}; "
                "give the same model= and guide=, or start a new run_dir."
            )
    if old["optimizer"].get("_target_") != new["optimizer"].get("_target_") or len(state.slots) != len(fresh.slots):
        raise UserError(
            f"the checkpoint was trained with {old['optimizer'].get('_target_')}: give the same optimizer=, "
            "or start a new run_dir."
        )
    if state.theta.dtype != fresh.theta.dtype:
        raise UserError(
            f"the checkpoint holds {state.theta.dtype} where this run computes in {fresh.theta.dtype}: set dtype=."
        )


def _items(facts: Any) -> list[Any]:
    return list(facts.items()) if isinstance(facts, dict) else list(facts)


def ranks(facts: dict[str, Any], world: World) -> Ranks:
    """This rank's share of the plan."""
    return Ranks(world.size, world.rank, facts["lanes"], facts["draws"])
