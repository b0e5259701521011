"""Which floating type a run computes in: the model's own, where it has one."""

import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trainer.errors import UserError, first_line
from trainer.inference.step import Inference
from trainer.training.first_rows import MOST

Name = Literal["float32", "float64"]
TYPES: dict[Name, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}
_SPEAKS_OF_TYPES = re.compile(
    r"dtype|scalar type|same type|type should be|should be the same|\bdouble\b", re.IGNORECASE
)

Problem = tuple[Inference, Tensor]


def in_its_precision(
    wanted: Name | None, rows: int, infer: Callable[[], Problem], say: Callable[[str], None]
) -> tuple[Name, Problem]:
    """The floating type's name and what ``infer()`` makes in it; torch's default type is it from here on.

    Without ``wanted`` float64 for few rows, else float32; the other one where the model cannot compute in that, since
    modules and tensors of its own are of the other type. Raises UserError where none is possible.
    """
    names: list[Name] = ["float64", "float32"] if rows <= MOST else ["float32", "float64"]
    names = names if wanted is None else [wanted]
    refused = ""
    for name in names:
        torch.set_default_dtype(TYPES[name])
        try:
            problem = infer()
        except (RuntimeError, UserError) as error:
            refused = _mixture(error, name)
            if not refused or (name == names[-1] and _of_script(error)):  # which may have another cause
                raise
            if name == names[-1]:
                raise UserError(_sentence(wanted, refused)) from error
            continue
        if refused:
            say(f"computing in {name}: {_reason(problem[0], name, refused)}")
        return name, problem
    raise AssertionError


def _of_script(error: BaseException) -> bool:
    """Whether TorchScript has failed, which does not always say at what."""
    return isinstance(error, RuntimeError) and "TorchScript" in first_line(error)


def _mixture(error: BaseException, name: Name) -> str:
    """The first line of an error that says, or may mean, that two types meet, else nothing."""
    if _of_script(error):
        return f"a TorchScript module fails in {name}"
    found = error.__cause__ if isinstance(error, UserError) else error
    if not isinstance(found, (RuntimeError, ValueError)):
        return ""
    line = first_line(found)
    return line if _SPEAKS_OF_TYPES.search(line) else ""


def _sentence(wanted: str | None, refused: str) -> str:
    if wanted is None:
        return f"the model computes neither in float64 nor in float32 ({refused}): make its tensors of one type."
    return (
        f"dtype={wanted} cannot be, since the model holds modules or tensors of another type ({refused}): leave dtype= "
        "out, or convert them."
    )


def _reason(inference: Inference, name: Name, refused: str) -> str:
    """What is of this type: modules, else what torch said."""
    held = {n: m for n, m in inference.parameters.modules.items() if _holds(m, TYPES[name])}
    named = [f'"{each}"' for each in held if each.split("_")[0] not in ("model", "guide")]  # by pyro.module
    found = named or sorted({f'"{type(module).__name__}"' for module in held.values()})
    if not found:
        return f"the model holds a tensor of that type ({refused})"
    return f"module{'s' * (len(found) > 1)} {', '.join(found)} hold{'s' * (len(found) == 1)} {name} parameters"


def _holds(module: torch.nn.Module, dtype: torch.dtype) -> bool:
    return any(each.dtype == dtype for each in (*module.parameters(), *module.buffers()))
