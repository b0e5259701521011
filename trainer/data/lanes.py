"""How many lanes a plan has where nobody says."""

import math

from trainer.errors import UserError


def default_lanes(batch_size: int, world_size: int, num_rows: int) -> int:
    """Eight lanes, or the fewest more that the ranks share evenly; fewer where eight cannot share ``batch_size``.

    So one, two, four and eight ranks read the same lanes. Raises UserError where the ranks cannot share the batch.
    """
    batch_size = min(batch_size, num_rows)
    if num_rows < world_size:
        raise UserError(f"rows({num_rows}) < ranks({world_size}): use fewer ranks.")
    for least in (8, 4, 2, 1):
        lanes = math.lcm(least, world_size)
        if batch_size % lanes == 0 or (least == 1 and batch_size == num_rows):
            return lanes
    near = batch_size // world_size * world_size
    raise UserError(
        f"batch_size({batch_size}) % ranks({world_size}) != 0: "
        f"use batch_size={near + world_size}{f' or {near}' if near else ''}."
    )
