"""The verbs, and the record of each: the types of its options. Defaults and comments stand in conf/VERB.yaml."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from omegaconf import DictConfig

from trainer.options.kinds import (
    Count,
    Filled,
    Names,
    NotNegative,
    Number,
    Part,
    PartOf,
    Parts,
    Pattern,
    Positive,
    Range,
    Seconds,
    Seed,
    Share,
    Within,
)

Places = Annotated[str | tuple[str, ...], Filled("a folder, a file or an address, or several as [a,b]")]
Columns = Annotated[str | tuple[str, ...], Filled("a source column, or several as [a,b]")]
Missing = Literal["error", "drop"]
Precision = Literal["float32", "float64"] | None
Threads = Annotated[int, Range(1, 1024)]
Draws = Annotated[int, Range(1, 1_000_000)]


@dataclass(frozen=True)
class Cache:
    """Of shards of an address."""

    dir: str | None
    bytes: Count | None
    timeout: Seconds


@dataclass(frozen=True)
class Data:
    """A folder, or several, to look at."""

    path: Places
    cache: Cache


@dataclass(frozen=True)
class TrainData(Data):
    lanes: Annotated[int, Range(1, 65_536)] | None
    run_rows: Count
    pool_blocks: Annotated[int, Range(1, 1_000_000)]
    memory: Count | None
    timeout: Seconds
    on_corrupt: Literal["error", "quarantine"]
    log_rows: str | None


@dataclass(frozen=True)
class Checkpoint:
    every_n_steps: Count | None
    every_minutes: Positive | None
    keep_last: Count
    track: bool


@dataclass(frozen=True)
class Trainer:
    """Where ranks compute, and for how long; Lightning's other options are its own."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Annotated[int, Range(1, 1024)] | Literal["auto"]
    num_nodes: Annotated[int, Range(1, 100_000)]
    max_time: (
        Annotated[str, Pattern(r"\d+:\d\d:\d\d:\d\d", "a time as days:hours:minutes:seconds")]
        | dict[str, Number]
        | None
    )


@dataclass(frozen=True)
class TrainTrainer(Trainer):
    timeout: Seconds


@dataclass(frozen=True)
class Budget:
    steps: Count
    epochs: Positive


@dataclass(frozen=True)
class Rate:
    """What an optimizer leaves null."""

    lr: Positive
    beta2: Share


@dataclass(frozen=True)
class Rates:
    whitened: Rate
    plain: Rate


@dataclass(frozen=True)
class Trial:
    """Of a study of Optuna's."""

    number: Annotated[int, Range(0)]
    storage: str
    study: str


@dataclass(frozen=True)
class OfRows:
    """How latents of rows are held, beside the options of any guide."""

    rows: Literal["auto", "integrate", "amortise", "mean_field"]
    nodes: Annotated[int, Range(1, 128)] | None
    row_draws: Annotated[int, Range(1, 4096)] | None
    widths: Annotated[tuple[Annotated[int, Range(1, 65_536)], ...], Filled("widths of layers, as [64,64]")] | None


@dataclass(frozen=True)
class Train:
    data: TrainData
    batch_size: Count
    max_epochs: Positive | None
    max_steps: Count | None
    draws: Annotated[int, Range(1, 65_536)] | None
    slots: Annotated[int, Range(1, 1_000_000)] | None
    seed: Seed
    dtype: Precision
    plate: str
    weight: str | None
    global_sites: Names
    threads: Threads | None
    ckpt_path: str | None
    checkpoint: Checkpoint
    trainer: Annotated[DictConfig, PartOf(TrainTrainer)]
    allow: Names
    debug: bool
    trial: Trial | None
    run_dir: str
    sweep_dir: str
    start: Literal["laplace", "zero"]
    estimator: Literal["plain", "anchor"]
    rounds: Annotated[int, Range(1, 30)]
    averaging: Share
    newton_after: NotNegative | None
    budget: Budget
    rates: Rates
    model: Part
    guide: Annotated[DictConfig, PartOf(OfRows)]
    objective: Part
    optimizer: Part
    schedule: Part
    program: Part
    logger: Parts
    stop: Part


@dataclass(frozen=True)
class Split:
    held_out: Share
    by: str | None
    time: str | None
    after: Number | str | None


@dataclass(frozen=True)
class Shard:
    source: str | None
    out: str | None
    columns: dict[str, Columns]
    like: Places | None
    rows: Count | None
    split: Split
    group_by: str | None
    categories: Names
    standardize: Names
    missing: Missing
    block_rows: Count
    shard_bytes: Count
    memory_bytes: Count
    workers: Threads | None
    part: Annotated[str, Pattern(r"\d+/\d+", "a part and their number, as 3/16")] | None
    finish: bool
    seed: Seed
    overwrite: bool
    allow: Names
    debug: bool
    model: Part


@dataclass(frozen=True)
class Verify:
    data: Data
    debug: bool


@dataclass(frozen=True)
class Inspect:
    data: Data
    rows: Annotated[int, Range(0)]
    debug: bool


@dataclass(frozen=True)
class Latents:
    run: str
    data: Data
    out: str
    draws: Draws
    quantiles: tuple[Within, ...]
    seed: Seed
    allow: Names
    debug: bool


@dataclass(frozen=True)
class Predict(Latents):
    latents: Literal["auto", "posterior", "prior"]


@dataclass(frozen=True)
class Export:
    run: str
    out: str
    draws: Draws
    seed: Seed
    allow: Names
    debug: bool


@dataclass(frozen=True)
class Runs:
    dir: str
    html: str | None
    best: bool
    storage: str | None
    study: str | None
    debug: bool


@dataclass(frozen=True)
class Sync:
    dir: str
    timeout: Seconds
    debug: bool


@dataclass(frozen=True)
class Doctor:
    folder: str
    threads: Count | None
    timeout: Seconds
    debug: bool
    trainer: Annotated[DictConfig, PartOf(Trainer)]


class Verb(NamedTuple):
    """What the command knows of a verb before it loads `trainer.verbs.NAME`, whose `run` takes the record and a folder.

    `run(record, folder)` prints what it finds, raises `UserError` for what the user can fix, and returns the number
    that a search compares (nats per row), or how many things it has done.
    """

    help: str
    record: type
    bare: str | None = None
    """The option that a first word without a key stands for."""


VERBS = {
    "shard": Verb("pack a table into shards", Shard),
    "verify": Verb("check every hash of a shard folder", Verify),
    "inspect": Verb("what a shard folder holds", Inspect),
    "train": Verb("fit a model to a table or its shards", Train),
    "predict": Verb("new observations at the rows of a table", Predict),
    "latents": Verb("the latents of each row of a table, given what is observed of it", Latents),
    "export": Verb("the posterior for ArviZ, or as safetensors", Export),
    "runs": Verb("the runs and sweeps below a folder, or the command of the best one", Runs, bare="dir"),
    "sync": Verb("what was logged offline, to W&B", Sync, bare="dir"),
    "doctor": Verb("what this machine or allocation can do, and what is wrong with it", Doctor),
}
