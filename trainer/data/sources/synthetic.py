"""A source that is computed: rows sampled from a model at known parameters."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from trainer.data.fields import Field, Raw, numpy_field
from trainer.errors import UserError

Sample = Callable[[np.random.Generator, int, int], dict[str, np.ndarray]]
_CHUNK_ROWS, _PIECE_CHUNKS = 8192, 32


class SyntheticSource:
    """``num_rows`` rows from ``sample(generator, first_row, rows)``, which returns columns [rows, ...] by name.

    Rows are sampled in chunks of 8,192 (the last may be short), chunk c by a Philox generator at (``seed``, c): they
    are the same in every pass, whatever the size of its batches. Raises UserError for no rows.
    """

    def __init__(self, sample: Sample, num_rows: int, *, seed: int = 0, name: str = "synthetic"):
        if num_rows < 1:
            raise UserError(f"a synthetic source needs at least one row, not {num_rows}.")
        self.name, self.num_rows, self._sample, self._seed = name, num_rows, sample, seed
        self.fields: dict[str, Field] = {
            column: numpy_field(values.dtype, values.shape[1:]) for column, values in self._chunk(0).items()
        }

    @property
    def piece_rows(self) -> Sequence[int]:
        """Rows of each piece: of 32 chunks."""
        step = _PIECE_CHUNKS * _CHUNK_ROWS
        return [min(step, self.num_rows - first) for first in range(0, self.num_rows, step)]

    def batches(
        self, rows: int, names: Sequence[str] | None = None, piece: int | None = None
    ) -> Iterator[dict[str, Raw]]:
        """The rows (of a piece) in order, at most ``rows`` a batch."""
        first_chunk, stop = (piece or 0) * _PIECE_CHUNKS, -(-self.num_rows // _CHUNK_ROWS)
        for chunk in range(first_chunk, stop if piece is None else min(first_chunk + _PIECE_CHUNKS, stop)):
            columns = self._chunk(chunk)
            for first in range(0, len(next(iter(columns.values()))), rows):
                yield {column: columns[column][first : first + rows] for column in names or self.fields}

    def _chunk(self, chunk: int) -> dict[str, np.ndarray]:
        first = chunk * _CHUNK_ROWS
        rows = min(_CHUNK_ROWS, self.num_rows - first)
        generator = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, chunk, 0]))
        columns = self._sample(generator, first, rows)
        for column, values in columns.items():
            if values.shape[:1] != (rows,):
                raise UserError(
                    f"the sampler of '{self.name}' returned column '{column}' of shape {list(values.shape)}: "
                    f"it was asked for {rows} rows."
                )
        return columns
