"""The process that compiles a chunk: it is given a `Recipe` in a folder, and leaves the shared object there.

    python -c "..." FOLDER PATH PARENT

``FOLDER`` is private to this compilation and holds recipe.json; ``PATH`` is where the result is kept between runs. Of
several processes that want the same ``PATH`` one compiles and the others wait. The process ends with its parent.
"""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cache import one_at_a_time, put

if TYPE_CHECKING:
    from trainer.inference.programs.scan import Recipe

_LOOK = 0.5  # seconds between looks for the parent
_SLOTS = 4  # of the example; any number is compiled for


class Stages:
    """The seconds of each stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.at = time.monotonic()

    def done(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.at = now - self.at, now


def main(folder: Path, path: Path, parent: int) -> None:
    """Compiles the recipe of ``folder`` unless ``path`` is there; result.json says how it went."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with, args=(parent, folder, path), daemon=True).start()
    result: dict[str, Any] = {}
    try:
        with one_at_a_time(path):
            if not path.exists():
                stages = Stages()
                compile_recipe(json.loads((folder / "recipe.json").read_text()), folder, stages)
                result["stages"] = stages.seconds
                try:
                    put(folder / "step.so", path)
                except OSError as error:
                    result["not kept"] = error.strerror or str(error)
    except Exception as error:
        result["error"] = compiler_line(error)
    (folder / "result.json").write_text(json.dumps(result))


def _end_with(parent: int, folder: Path, path: Path) -> None:
    """Ends this process and its compilers when the parent has ended."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        path.with_suffix(".lock").unlink()  # if it is another's, the step is compiled twice, no worse
    os.killpg(0, signal.SIGKILL)


def compiler_line(error: Exception) -> str:
    """Of a failed compilation the first line that tells why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = (line for line in lines if "error:" in line or "No such file" in line or "No space" in line)
    return next(telling, lines[0] if lines else type(error).__name__)


def compile_recipe(given: dict[str, Any], folder: Path, stages: Stages) -> None:
    """Leaves ``folder``/step.so. ``given``: the recipe, and "threads" and "compiler", on which its code depends.

    The noise (normals.cpp) is the same for every model: the compiler takes it while Python makes the step's code.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    import logging
    import warnings

    import torch
    import torch._inductor.compile_fx
    import torch._inductor.config as config
    import torch._inductor.inductor_prims  # an operation of the step's code

    from trainer.inference.programs.scan import Recipe
    from trainer.inference.programs.side_by_side import SideBySide

    stages.done("import torch")
    warnings.simplefilter("ignore")
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    torch.set_num_threads(given.pop("threads"))
    torch.set_default_dtype(getattr(torch, given["dtype"]))
    options = {
        "aot_inductor.output_path": str(folder / "step.so"),
        "aot_inductor.enable_line_tables": False,
        "cpp.cxx": (given.pop("compiler"),),
        "cpp.vec_isa_ok": True,  # else a program is compiled and run to find out
    }
    with torch.no_grad(), config.patch(options), SideBySide(Path(__file__).with_name("normals.cpp"), folder) as built:
        graph, inputs = _graph(Recipe(**given))
        stages.done("graph")
        torch._inductor.aot_compile(graph, tuple(inputs), options=options)
        now = time.monotonic()
        stages.seconds["Inductor"] = built.began - stages.at
        stages.seconds["compiler and linker"] = now - built.began


def _graph(recipe: "Recipe") -> tuple[Any, list[Any]]:
    """The whole chunk as a graph over any number of slots, and inputs like those it takes."""
    import torch
    from torch._higher_order_ops.scan import scan_op
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    symbols, scan = ShapeEnv(), recipe.scan()
    mode = FakeTensorMode(shape_env=symbols)
    carried, held = len(recipe.carry), len(recipe.data)
    shapes = [*recipe.carry, *((kind, (_SLOTS, *shape)) for kind, shape in recipe.data), *recipe.fixed]
    inputs = [torch.zeros(shape, dtype=getattr(torch, kind)) for kind, shape in shapes]

    def chunk(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        carry, data, fixed = tensors[:carried], tensors[carried : carried + held], tensors[carried + held :]
        slots, shared = scan.before(carry, data, fixed), scan.shared(fixed)

        def body(*each: torch.Tensor) -> tuple[torch.Tensor, ...]:
            made = scan.call(*each)
            return *(new.clone() for new in made[:carried]), *made[carried:]

        return tuple(scan_op(body, list(carry), list(slots), shared))

    def fake(at: int, tensor: torch.Tensor) -> torch.Tensor:
        sizes = [DimDynamic.STATIC] * tensor.dim()
        if carried <= at < carried + held:
            sizes[0] = DimDynamic.DUCK  # one symbol for all
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    graph = make_fx(chunk, tracing_mode="fake")(*(fake(at, each) for at, each in enumerate(inputs)))
    if symbols.replacements:
        raise RuntimeError("the step depends on the number of slots of a chunk")
    return graph, inputs
