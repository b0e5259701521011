"""One command, one table, and bench/bench.json beside it. See `--help` for running a part."""

import argparse
import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from scripts.benchmark.posterior import OURS, RATES, Arrival, arrivals_table, race
from scripts.benchmark.problems import MODELS, Setting, load, make_data, row_bytes
from scripts.benchmark.table import ProgressLine, name_of, ratios, ratios_table, results_table
from scripts.benchmark.turns import COMPILING, Result, cores, play
from scripts.benchmark.worker import CONTENDERS

_STORED = 1_000_000  # rows; a larger N repeats them
_CPU = [name for name in CONTENDERS if name != OURS]
_CUDA = [name for name in _CPU if not name.startswith("pyro")]
_QUICK = {"models": ["logistic"], "batch": [256], "rows": [20_000], "seconds": 0.2, "rounds": 3}
_RACE = {"models": ["logistic"], "batch": [4_096], "rows": [_STORED], "seconds": 0.0, "rounds": 3}
_QUICK_RACE = {**_RACE, "batch": [1_024], "rows": [100_000], "rounds": 1}
_FULL = {
    "models": list(MODELS),
    "batch": [256, 4_096, 65_536],
    "rows": [_STORED, 100 * _STORED],
    "seconds": 5.0,
    "rounds": 5,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="rows of a step")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="above 10^6 with the middle batch only")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--seconds", type=float, help="of a round, at least (5)")
    parser.add_argument(
        "--rounds", type=int, help="medians are over these (5); with --posterior over as many seeds (3)"
    )
    parser.add_argument("--slots", type=int, default=64, metavar="K", help="steps a call, for NumPyro's scan and us")
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, len(cores()) - 1),
        help="and as many cores; one core more where a reader works beside (default: all cores but one)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--posterior", action="store_true", help="instead: seconds until the means are right")
    parser.add_argument("--quick", action="store_true", help="a smoke test: one small setting")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the rows and the JSON")
    arguments = parser.parse_args()
    defaults = (
        (_QUICK_RACE if arguments.quick else _RACE) if arguments.posterior else _QUICK if arguments.quick else _FULL
    )
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def settings(arguments: argparse.Namespace) -> list[Setting]:
    """Every model at every batch size; a large N at the middle one."""
    middle = sorted(arguments.batch)[len(arguments.batch) // 2]
    made = []
    for model in arguments.models:
        for num_obs in arguments.rows:
            stored = min(num_obs, _STORED)
            folder = str((arguments.out / "data" / f"{model}-{stored}").absolute())
            for batch in arguments.batch:
                if batch <= stored and (num_obs == stored or batch == middle):
                    slots = min(arguments.slots, stored // batch)
                    made.append(
                        Setting(model, batch, num_obs, stored, slots, arguments.threads, arguments.device, folder)
                    )
    return made


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    versions = {}
    for name in ("torch", "pyro-ppl", "numpyro", "jax", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"platform": platform.platform(), "cores": cores(), "gpu": gpu, "load": os.getloadavg(), **versions}


def save(path: Path, content: dict[str, Any], arguments: argparse.Namespace) -> None:
    chosen = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    path.write_text(json.dumps({"machine": machine(), "arguments": chosen, **content}, indent=1))


def measure(arguments: argparse.Namespace, console: Console) -> None:
    """The table of steps; the JSON is written anew after each setting."""
    names = arguments.contenders or (_CPU if arguments.device == "cpu" else _CUDA)
    path = arguments.out / ("bench.json" if arguments.device == "cpu" else "bench_gpu.json")
    every = settings(arguments)
    each = len(names) * (COMPILING + arguments.rounds * arguments.seconds)
    line = ProgressLine(console, len(every) * each)
    done: list[list[Result]] = []
    try:
        for setting in every:
            line.enter(name_of(setting))
            folder = Path(setting.folder)
            make_data(setting.model, setting.stored_rows, folder, shards="fused-shards" in names)
            done.append(play(setting, names, arguments.rounds, arguments.seconds, arguments.out / "log.txt", line.tick))
            save(path, content(done), arguments)
    finally:
        line.close()
    console.print(results_table(done))
    console.print(ratios_table([ratio for results in done for ratio in ratios(results)]))
    console.print(f"{path} has every round, {arguments.out / 'log.txt'} what the processes said.")


def content(done: list[list[Result]]) -> dict[str, Any]:
    """The JSON of the settings so far."""
    figures = []
    for results in done:
        speeds = {result.contender: result.speed for result in results if not result.error}
        for result in results:
            here = result.as_dict()
            if "copy" in speeds and not result.error:
                here["of_a_copy"] = result.speed / speeds["copy"]
                here["bytes_per_second"] = result.speed * row_bytes(load(result.setting, mapped=True))
            figures.append(here)
    compared = [
        {"ratio": ratio.label, "setting": name_of(ratio.setting), "times_as_fast": ratio.value}
        for results in done
        for ratio in ratios(results)
    ]
    return {"results": figures, "ratios": compared}


def measure_posterior(arguments: argparse.Namespace, console: Console) -> None:
    """The tables of arrivals."""
    every = [setting for setting in settings(arguments) if setting.model != "network"]
    line = ProgressLine(console, len(every) * (len(RATES) + 2) * (COMPILING + 10.0 * arguments.rounds))
    found: dict[str, list[Arrival]] = {}
    try:
        for setting in every:
            line.enter(f"{name_of(setting)}, time to posterior")
            make_data(setting.model, setting.stored_rows, Path(setting.folder), shards=True)
            found[name_of(setting)] = race(setting, arguments.rounds, arguments.out / "log.txt", line.tick)
            content = {name: [asdict(each) for each in arrivals] for name, arrivals in found.items()}
            save(arguments.out / "posterior.json", {"arrivals": content}, arguments)
    finally:
        line.close()
    for setting in every:
        console.print(arrivals_table(found[name_of(setting)], setting))


def main() -> None:
    arguments = parse()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        console.print("bench: torch sees no GPU here, there is nothing to measure.")
        return
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (measure_posterior if arguments.posterior else measure)(arguments, console)


if __name__ == "__main__":
    main()
