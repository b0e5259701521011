"""`data.on_corrupt=quarantine`: training on the blocks that are intact, with their own N, the same on every rank."""

from pathlib import Path

from rich.console import Console

from trainer.data.shards.files import read_index
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.index import INDEX_NAME, Index, write_index
from trainer.data.shards.verify import LEFT_OUT, bad_blocks, intact
from trainer.distributed.ranks import World, of_all
from trainer.errors import UserError, counted
from trainer.training.row_progress import RowProgress

_NAMED = 5


def without_damage(folder: ShardFolder, run_dir: Path, here: World, console: Console) -> ShardFolder:
    """``folder`` with the index of its intact blocks, which is kept in ``run_dir`` for when it is resumed.

    The ranks share the check of all shards. Raises UserError where nothing is intact, or a shard cannot be reached.
    """
    place = run_dir / "quarantine" / folder.index.split
    launched = not here.external and here.rank > 0  # by rank 0, which has looked
    goes_on = launched or any((run_dir / "checkpoints").glob("*.ckpt"))
    index = _kept(place, folder.index) if goes_on else None
    if not of_all(index is not None, here)[0] and not launched:
        index = intact(folder.index, _bad(folder, here, console))
        if here.rank == 0:
            place.mkdir(parents=True, exist_ok=True)
            write_index(place, index)
    if index is None:
        raise UserError(f"{place}/{INDEX_NAME} is not seen by rank {here.rank}: put run_dir= where all ranks see it.")
    told = index.meta[LEFT_OUT]
    if not told["blocks"]:
        return folder
    console.print(
        f"{told['rows']:,} of {counted(folder.num_rows, 'row')} are left out, in "
        f"{counted(told['blocks'], 'damaged block')} of {folder.place} "
        f"(data.on_corrupt=quarantine); the index of the others is in {place}",
        markup=False,
    )
    return ShardFolder(folder.files, False, folder.timeout, index)


def _bad(folder: ShardFolder, here: World, console: Console) -> set[int]:
    """The blocks that are damaged, all ranks having looked; some are named. Raises what a rank raises, on each."""
    share = range(here.rank, len(folder.index.shards), here.size if here.external else 1)
    own: dict[int, str] | UserError
    try:
        with RowProgress(console, "checking") as watch:
            own = bad_blocks(folder, share, watch.show)
    except UserError as error:
        own = error
    bad: dict[int, str] = {}
    for each in of_all(own, here):
        if isinstance(each, UserError):
            raise each
        bad |= each
    if len(bad) == len(folder.block_rows):
        raise UserError(f"no block of {folder.place} is intact: copy its shards again, or pack the table again.")
    sentences = dict.fromkeys(bad[block].rpartition(": ")[0] for block in sorted(bad))
    for sentence in list(sentences)[:_NAMED]:
        console.print(sentence, markup=False)
    if len(sentences) > _NAMED:
        console.print(f"and {len(sentences) - _NAMED:,} more, which metrics.json will name")
    return set(bad)


def _kept(place: Path, whole: Index) -> Index | None:
    """The index that was made of ``whole`` before, if one was."""
    if not (place / INDEX_NAME).is_file():
        return None
    index = read_index(place)
    return index if index.meta.get(LEFT_OUT, {}).get("of") == whole.digest else None
