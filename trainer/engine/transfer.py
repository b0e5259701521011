"""Chunks to a GPU while it computes: through pinned memory, on a stream of their own, one chunk ahead."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.inference.model.plates import Batch


def sent_ahead(chunks: Iterable[Batch | UserError], device: torch.device) -> Iterator[Batch | UserError]:
    """``chunks`` on ``device`` (a GPU), the next one on its way while the caller uses this one."""
    stream = torch.cuda.Stream(device)

    def sent(chunk: Batch | UserError) -> Callable[[], Batch | UserError]:
        """Sends a chunk; the answer gives it to the stream of the caller, which waits for it there."""
        if isinstance(chunk, UserError):
            return lambda: chunk
        with torch.cuda.stream(stream):
            there = chunk.map(lambda each: each.pin_memory().to(device, non_blocking=True))
            arrived = stream.record_event()

        def received() -> Batch:
            here = torch.cuda.current_stream(device)
            here.wait_event(arrived)

            def used_here(tensor: Tensor) -> Tensor:
                tensor.record_stream(here)
                return tensor

            return there.map(used_here)

        return received

    ahead: Callable[[], Batch | UserError] | None = None
    for chunk in chunks:
        coming = sent(chunk)
        if ahead is not None:
            yield ahead()
        ahead = coming
    if ahead is not None:
        yield ahead()
