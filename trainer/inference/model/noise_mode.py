"""Noise for models and guides that draw for themselves: every random operation takes its normals from the given ones.

A dispatch mode sees `normal_`, `randn`, `rand`, `bernoulli_` and their kin below every library, so Pyro's autoguides,
users' own guides and models with dropout need no change, and a compiled step holds the draws. What is no transformation
of normals (Gamma, Dirichlet) is drawn from torch's generator, seeded by (run, step, draw), in an eager program.

Shapes: B rows; elements [E], rows [B, n].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.errors import UserError
from trainer.inference.model.plates import Batch
from trainer.inference.model.ragged import cat

_aten = torch.ops.aten


class NoiseLayout(NamedTuple):
    """The random operations of one evaluation, in their order."""

    axes: tuple[int | None, ...]
    """The axis from the right that runs over the batch's rows, of each draw; None: it has none."""
    elements: int
    per_row: int
    """E and n: the normals that these draws take, without such an axis and per row."""
    others: bool
    """Whether torch's own generator is asked too."""

    @property
    def empty(self) -> bool:
        """Whether nothing is drawn."""
        return not self.axes and not self.others


def measure_noise(run: Callable[[Batch], Any], batch: Batch) -> NoiseLayout:
    """What ``run(batch)`` draws, from two calls of which the second has a row more: the axis that grows is the rows'.

    Raises UserError where the two calls draw in different ways.
    """
    one, two = _Measuring(), _Measuring()
    with one:
        run(batch)
    with two:
        run(_with_a_row_more(batch))
    if [len(shape) for shape in one.shapes] != [len(shape) for shape in two.shapes]:
        raise UserError(
            f"on {batch.size} rows {len(one.shapes)} random numbers or tensors are drawn, on {batch.size + 1} rows "
            f"{len(two.shapes)}: draw the same ones whatever the rows."
        )
    axes: list[int | None] = []
    elements, per_row = 0, 0
    for a, b in zip(one.shapes, two.shapes):
        grown = [i for i in range(len(a)) if a[i] != b[i]]
        if len(grown) > 1 or any(b[i] != a[i] + 1 or a[i] != batch.size for i in grown):
            raise UserError(
                f"a random tensor of shape {tuple(a)} is drawn on {batch.size} rows and one of {tuple(b)} on "
                f"{batch.size + 1}: draw tensors with one axis over the rows, or none."
            )
        if grown:
            axes.append(grown[0] - len(a))
            per_row += a.numel() // a[grown[0]]
        else:
            axes.append(None)
            elements += a.numel()
    return NoiseLayout(tuple(axes), elements, per_row, one.others)


class NoiseMode(TorchDispatchMode):
    """Serves the draws of ``layout`` from ``elements`` and ``rows``, in their order."""

    def __init__(self, layout: NoiseLayout, elements: Tensor, rows: Tensor | None, seed: int):
        super().__init__()
        self.layout, self.elements, self.rows, self.seed = layout, elements, rows, seed
        self.draws, self.used, self.used_of_rows = 0, 0, 0

    def __enter__(self) -> "NoiseMode":
        if self.layout.others:
            seed_generators(self.seed)
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        serve = _SERVED.get(func)
        return func(*args, **kwargs) if serve is None else serve(self._normals, *args, **kwargs)

    def _normals(self, like: Tensor) -> Tensor:
        """The next draw, in the shape of ``like``."""
        axis = self.layout.axes[self.draws]
        self.draws += 1
        if axis is None:
            count = like.numel()
            self.used += count
            return self.elements[self.used - count : self.used].view(like.shape).to(like)
        count = like.numel() // like.shape[axis]
        self.used_of_rows += count
        assert self.rows is not None
        values = self.rows[:, self.used_of_rows - count : self.used_of_rows]
        return values.reshape(like.movedim(axis, 0).shape).movedim(0, axis).to(like)


class AtMean(TorchDispatchMode):
    """Serves the means of what is drawn from torch's own generator, so that a row's draw does not depend on the others
    in its batch.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._standard_gamma.default:
            return args[0].clone()
        if func is _aten._sample_dirichlet.default:
            return args[0] / args[0].sum(-1, keepdim=True)
        return func(*args, **(kwargs or {}))


def seed_generators(seed: int) -> None:
    """Seeds torch's own generators, those of CUDA where it is in use.

    `torch.manual_seed` also keeps, for devices that may yet come to use, the seed and a stack trace of every call.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class _Measuring(TorchDispatchMode):
    """Serves zeros and notes their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []
        self.others = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SERVED:
            return _SERVED[func](self._normals, *args, **kwargs)
        self.others = self.others or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **kwargs)

    def _normals(self, like: Tensor) -> Tensor:
        self.shapes.append(like.shape)
        return torch.zeros_like(like)


def _with_a_row_more(batch: Batch) -> Batch:
    """The last row twice."""

    def longer(column: Any) -> Any:
        return cat([column, column[-1:]])

    row_id = None if batch.row_id is None else longer(batch.row_id)
    return batch._replace(columns={name: longer(column) for name, column in batch.columns.items()}, row_id=row_id)


_Normals = Callable[[Tensor], Tensor]


def _uniform(normals: _Normals, like: Tensor) -> Tensor:
    tiny = torch.finfo(like.dtype).eps
    shares: Tensor = torch.special.ndtr(normals(like))
    return shares.clamp(tiny, 1 - tiny)


def _empty(args: Any, kwargs: Any) -> Tensor:
    return torch.empty(*args, **{name: value for name, value in kwargs.items() if name != "generator"})


def _empty_like(like: Tensor, kwargs: Any) -> Tensor:
    """Of a floating type, whatever ``like`` is."""
    return torch.empty_like(like, **{"dtype": like.dtype if like.is_floating_point() else torch.float32, **kwargs})


def _heads(normals: _Normals, like: Tensor, p: float | Tensor) -> Tensor:
    return (_uniform(normals, _empty_like(like, {})) < p).to(like.dtype)


def _dropout(normals: _Normals, like: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
    if not train:
        return like.clone(), torch.ones_like(like, dtype=torch.bool)
    kept = _heads(normals, like, 1.0 - p)
    return like * kept / (1.0 - p), kept.bool()


_SERVED: dict[Any, Callable[..., Any]] = {
    _aten.normal_.default: lambda n, x, mean=0.0, std=1.0, **_: x.copy_(mean + std * n(x)),
    _aten.uniform_.default: lambda n, x, low=0.0, high=1.0, **_: x.copy_(low + (high - low) * _uniform(n, x)),
    _aten.bernoulli_.float: lambda n, x, p=0.5, **_: x.copy_(_heads(n, x, p)),
    _aten.bernoulli.default: lambda n, p, **_: _heads(n, p, p),
    _aten.bernoulli.p: lambda n, x, p=0.5, **_: _heads(n, x, p),
    _aten.randn_like.default: lambda n, x, **options: n(_empty_like(x, options)),
    _aten.rand_like.default: lambda n, x, **options: _uniform(n, _empty_like(x, options)),
    _aten.randn.default: lambda n, *args, **options: n(_empty(args, options)),
    _aten.rand.default: lambda n, *args, **options: _uniform(n, _empty(args, options)),
    _aten.native_dropout.default: _dropout,
}
