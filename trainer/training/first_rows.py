"""The first rows of a folder: what a start is made from, checked before it is."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from trainer.data.fields import concatenate
from trainer.data.shards.folder import ShardFolder
from trainer.data.shards.index import ROW_ID
from trainer.errors import UserError
from trainer.inference.checks.enumeration import LEAST_ROWS
from trainer.inference.checks.observed import RowCheck, with_parameters
from trainer.inference.model.plates import WEIGHT, Batch
from trainer.inference.step import Inference
from trainer.posterior.first_pass import FirstPass
from trainer.posterior.tensors import to_tensor

MOST = 65_536
_TOGETHER = 2**18  # rows of a sample that fit memory, where none has latents of its own


def first_rows(folder: ShardFolder, names: Sequence[str]) -> Batch:
    """The first rows (which packing has shuffled) of the columns ``names``: 65,536 at most, or a block."""
    dtype, blocks, count = torch.get_default_dtype(), 0, 0
    for rows in folder.block_rows.tolist():
        if count and count + rows > MOST:
            break
        blocks, count = blocks + 1, count + rows
    columns = {
        name: to_tensor(concatenate([folder.read_block(b, name) for b in range(blocks)]), dtype)
        for name in (*names, ROW_ID)
    }
    row_id = columns.pop(ROW_ID)
    return Batch.whole(columns, row_id)


def sample_of(rows: Batch, copies: int) -> Batch:
    """The one lane group from which start and curvature are taken: ``rows``, or so many of them, of which each takes
    as much as ``copies`` others, as fit memory.
    """
    most = max(LEAST_ROWS, _TOGETHER // copies)
    return (rows if rows.size <= most else rows.at(torch.arange(most))).as_group()


def first_pass(
    folder: ShardFolder,
    rows: Batch,
    held_out: ShardFolder | None,
    inference: Inference,
    theta: torch.Tensor,
    until: int,
) -> FirstPass:
    """Checks the first ``rows`` of a folder and those of the held-out one, and gives what checks the others as they
    come: those of chunks before step ``until``.

    Raises UserError for the first wrong row, by its number, and where no row has a weight. A mean-field guide starts at
    u = 0, so there the log density has to be finite too.
    """
    names, bounds = inference.model.arguments, _bounds(folder)
    if inference.model.weighted and bounds.get(WEIGHT, (0.0, 1.0))[1] == 0:
        raise UserError(f'column "{WEIGHT}" is 0 in every row, so that none counts: give them weights above 0.')
    check = RowCheck(inference.model.at_first, with_parameters(inference.parameters, theta), bounds)
    check.refuse(rows, density=inference.gaussian is not None)
    check.learn(rows)
    made = FirstPass(check, folder, until)
    if rows.size == folder.num_rows:
        made.done(folder)
    if held_out is not None:
        rows = first_rows(held_out, names)
        check.refuse(rows)
        if rows.size == held_out.num_rows:
            made.done(held_out)
    return made


def _bounds(folder: ShardFolder) -> Mapping[str, tuple[float, float]]:
    """The least and the greatest number of each column whose statistics tell them."""
    if folder.index.meta.get("group_by"):  # what fills groups up is not among them
        return {}
    known = {each.name: each.statistics for each in folder.index.columns if each.statistics and each.kind == "dense"}
    return {name: (float(np.min(s["min"])), float(np.max(s["max"]))) for name, s in known.items()}
