"""What a run fixes at its first launch, and what must be the same when it is resumed.

The plan (lanes, batch size, seed) and the number of draws belong to the run, not to the launch: they come from the
checkpoint where there is one, so that another world size reads the same rows with the same noise. Another batch size,
and other lanes, hold from the checkpoint's step on.
"""

from dataclasses import replace
from pathlib import Path

from trainer.data.address import is_address
from trainer.data.lanes import default_lanes
from trainer.data.shards.files import AHEAD
from trainer.data.shards.folder import ShardFolder
from trainer.distributed.ranks import World, of_all
from trainer.engine import checkpoint
from trainer.engine.train_state import PlanChoice, Problem, TrainState, differing
from trainer.errors import UserError, counted
from trainer.inference.optim.rounds import State
from trainer.options.verbs import Train
from trainer.training.budget import Begun

_TOGETHER = 8  # shards, of each lane
Saved = tuple[State, TrainState]


def saved(ckpt_path: str | None, run_dir: Path) -> Saved | None:
    """The checkpoint to resume from: `last` is the newest complete one of ``run_dir``, or None where none was saved."""
    if ckpt_path is None:
        if any((run_dir / "checkpoints").glob("*.ckpt")):
            raise UserError(f"{run_dir} holds a run already: continue it with ckpt_path=last, or give another run_dir=")
        return None
    if ckpt_path == "last":
        path = checkpoint.newest(run_dir / "checkpoints")
        return None if path is None else _loaded(path)
    if is_address(ckpt_path):
        raise UserError(f"ckpt_path={ckpt_path} is a URL: copy the checkpoint and its .json to this machine first.")
    return _loaded(Path(ckpt_path))


def _loaded(path: Path) -> Saved:
    state, content = checkpoint.load(path)
    return state, TrainState.of(content)


def plan_choice(cfg: Train, folder: ShardFolder, world: World, old: Saved | None) -> PlanChoice:
    """Lanes, batch size, seed, runs and draws of the plan: those of a fresh run, or the checkpoint's.

    Where another batch size, other lanes or draws are given, or the ranks need other lanes, they hold from the
    checkpoint's step on, and `EpochRemainder` says what its epoch has left.
    """
    batch_size = min(cfg.batch_size, folder.num_rows)
    if old is None:
        lanes = cfg.data.lanes or default_lanes(batch_size, world.size, folder.num_rows)
        choice = PlanChoice(
            lanes=lanes,
            batch_size=batch_size,
            seed=cfg.seed,
            run_rows=cfg.data.run_rows,
            pool_blocks=cfg.data.pool_blocks,
            shards_together=_shards_together(folder, lanes, world),
            draws=cfg.draws or world.size,
            index=folder.index.digest,
        )
    else:
        before = old[1].problem.plan
        _refuse_other_rows(cfg, folder, before)
        choice = replace(before, draws=cfg.draws or before.draws)
        lanes = cfg.data.lanes or before.lanes
        if cfg.data.lanes is None and (lanes % world.size or (batch_size % lanes and batch_size < folder.num_rows)):
            lanes = default_lanes(batch_size, max(world.size, choice.draws), folder.num_rows)
        if (lanes, batch_size) != (before.lanes, before.batch_size):
            rest = before.plan(folder).rest_at(int(old[0].step)).plain()
            choice = replace(choice, lanes=lanes, batch_size=batch_size, rest=rest)
    _refuse_uneven(choice.lanes, choice.draws, world.size)
    return choice


def begun(old: Saved | None) -> Begun | None:
    """What the saved run had taken and planned; None without one (or one of a version that did not say)."""
    return None if old is None or old[1].problem.rounds is None else Begun(int(old[0].step), old[1].problem.rounds)


def fineness(old: Saved | None) -> list[int] | None:
    """That of the saved run's integrals over rows; None where it does not say."""
    return None if old is None else old[1].fineness


def changes(was: PlanChoice, now: PlanChoice) -> str:
    """What of the plan is other than it was, in words."""
    words = {"batch_size": "batch_size", "lanes": "data.lanes", "draws": "draws"}
    found = [
        f"{word}={getattr(now, name)} (it was {getattr(was, name)})"
        for name, word in words.items()
        if getattr(now, name) != getattr(was, name)
    ]
    return f" with {', '.join(found)}" if found else ""


def _refuse_other_rows(cfg: Train, folder: ShardFolder, before: PlanChoice) -> None:
    if before.index != folder.index.digest:
        raise UserError(
            f"the checkpoint was trained on other data than {cfg.data.path} (index {before.index[:12]} is not "
            f"{folder.index.digest[:12]}): give the same shards (and data.on_corrupt=), or start a new run_dir."
        )
    if before.seed != cfg.seed:
        raise UserError(
            f"the checkpoint was trained with seed={before.seed}, not {cfg.seed}: "
            f"give seed={before.seed}, or start a new run_dir."
        )


def _shards_together(folder: ShardFolder, lanes: int, world: World) -> int:
    """Few where the cache of some rank cannot hold all shards, else 0, for all of them.

    Raises UserError where it holds too few.
    """
    sizes, room = [shard.bytes for shard in folder.index.shards], min(of_all(folder.files.room, world))
    if sum(sizes) <= room:
        return 0 if 2 * sum(sizes) <= room else _TOGETHER
    fit, least = int(room // max(sizes)), lanes + AHEAD
    if fit < least:
        raise UserError(
            f"the cache has room for {counted(fit, 'shard')} of {folder.place} where {least} are in use at a time: "
            f"give data.cache.bytes={least * max(sizes)} or more, free some of the disk, or pack with smaller "
            "shard_bytes=."
        )
    return min(_TOGETHER, (fit - AHEAD) // lanes)


def _refuse_uneven(lanes: int, draws: int, ranks: int) -> None:
    if lanes % ranks:
        raise UserError(f"lanes({lanes}) % ranks({ranks}) != 0: use a world size that divides {lanes}, or data.lanes=.")
    if lanes % draws:
        raise UserError(f"lanes({lanes}) % draws({draws}) != 0: choose draws= that divides {lanes}, or data.lanes=.")
    if ranks % draws and draws % ranks:
        raise UserError(
            f"draws({draws}) and ranks({ranks}): one must divide the other; choose draws= or the world size."
        )


def taken_over(saved: Saved | None, record: TrainState, fresh: State) -> State:
    """The state to begin at: ``fresh``, or the ``saved`` one, whose progress ``record`` takes over.

    Raises UserError where the checkpoint belongs to another problem.
    """
    if saved is None:
        return fresh
    state, old = saved
    check_same(old.problem, record.problem, state, fresh)
    record.resumed(old)
    return state


def check_same(old: Problem, new: Problem, state: State, fresh: State) -> None:
    """Raises UserError where a checkpoint belongs to another model, guide or optimizer."""
    for what in ("sites", "shapes"):
        before, now = getattr(old, what), getattr(new, what)
        if before != now:
            raise UserError(
                f"the checkpoint belongs to another model or guide: its {what} differ in "
                f"{', '.join(differing(before, now)[:6])}; "
                "give the same model= and guide=, or start a new run_dir."
            )
    before, now = (str(each.optimizer.get("_target_")).rpartition(".")[2] for each in (old, new))
    if before != now or state.named().keys() != fresh.named().keys():
        raise UserError(
            f"the checkpoint was trained with {before}, not {now}: give the same optimizer=, or start a new run_dir."
        )
    if state.theta.dtype != fresh.theta.dtype:
        raise UserError(
            f"the checkpoint holds {state.theta.dtype} where this run computes in {fresh.theta.dtype}: set dtype=."
        )
