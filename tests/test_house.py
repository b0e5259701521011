"""The floors of the house: imports point down only, and each library stays in the rooms that may use it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = ("errors", "cache")
FLOORS = [  # from the ground up; rooms of one floor do not import each other
    ("distributed",),
    ("inference", "data", "models"),
    ("posterior",),
    ("engine",),
    ("options",),
    ("runs",),
    ("sweeps",),
    ("training",),
    ("verbs",),
]
MAY_IMPORT = {
    room: {room, *LEAVES, *(below for lower in FLOORS[:number] for below in lower)}
    for number, floor in enumerate(FLOORS)
    for room in floor
}
MAY_IMPORT["data"] -= {"distributed"}
ROOF = {"options", "runs", "sweeps", "training", "verbs"}
ROOMS_OF = {
    "pyro": {"inference", "models", "posterior", "training"},
    "hydra": {"options", "runs", "sweeps", "cli"},
    "omegaconf": {*ROOF, "cli"},
    "pytorch_lightning": {"engine", "runs", "sweeps", "training", "verbs"},
    "wandb": {"engine", "runs", "verbs"},
    "optuna": {"sweeps"},
    "pyarrow": {"data"},
    "webdataset": {"data"},
    "torch": {"distributed", "inference", "models", "posterior", "engine", *ROOF},
}
INFERENCE = (  # its own floors, from the ground up
    *("model", "rows", "guides", "objectives", "optim", "step", "checks", "setup"),
    *("programs", "estimates", "recipe", "isolation"),
)
MODULES = sorted((ROOT / "trainer").rglob("*.py"))


def imports(source: str) -> set[str]:
    """Every dotted name that ``source`` imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def broken_rules(room: str, source: str) -> list[str]:
    """What ``source``, standing in ``trainer/ROOM``, imports against the rules."""
    wrong = []
    for name in sorted(imports(source)):
        top, *rest = name.split(".")
        if top == "trainer" and rest and room in MAY_IMPORT and rest[0] not in MAY_IMPORT[room]:
            wrong.append(f"{room} imports {name}, which is not below it")
        if top in ROOMS_OF and room not in ROOMS_OF[top]:
            wrong.append(f"{room} imports {top}, which belongs to {', '.join(sorted(ROOMS_OF[top]))}")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_keeps_to_its_floor(path):
    parts = path.relative_to(ROOT / "trainer").parts
    room = parts[0] if len(parts) > 1 else path.stem
    assert not broken_rules(room, path.read_text())


def test_the_rules_can_be_broken():
    assert broken_rules("inference", "from trainer.data.plan import Plan")
    assert broken_rules("data", "def f():\n    import pyro")
    assert broken_rules("engine", "import hydra")
    assert broken_rules("runs", "from trainer.verbs import train")
    assert not broken_rules("engine", "from trainer.inference.step import State\nimport pytorch_lightning")


def test_inference_has_floors_of_its_own():
    folder = ROOT / "trainer" / "inference"
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).with_suffix("").parts[0]
        below = {name.split(".")[2] for name in imports(path.read_text()) if name.startswith("trainer.inference.")}
        if own != "__init__":
            assert not {name for name in below if INFERENCE.index(name) > INFERENCE.index(own)}, path


def test_verbs_do_not_import_each_other():
    for path in (ROOT / "trainer" / "verbs").glob("*.py"):
        assert not {name for name in imports(path.read_text()) if name.startswith("trainer.verbs")}, path


def test_no_module_imports_in_a_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    edges = {name: imports(path.read_text()) & names.keys() - {name} for name, path in names.items()}
    while edges:
        leaves = {name for name, below in edges.items() if not below & edges.keys()}
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {name: below for name, below in edges.items() if name not in leaves}


def test_packages_are_no_hubs_and_files_are_readable():
    for path in MODULES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 300, f"{path} has {len(lines)} lines"
        if path.name == "__init__.py" and path.parent != ROOT / "trainer":  # the front door
            assert len(lines) < 5, f"{path} re-exports"


def test_nothing_names_a_path_of_one_machine():
    texts = [p for folder in ("trainer", "conf", "docs", "scripts", "slurm") for p in (ROOT / folder).rglob("*")]
    for path in [*texts, ROOT / "README.md"]:
        if path.is_file() and path.suffix not in (".pyc", ".png"):
            text = path.read_text()
            for folder in ("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/"):
                assert folder not in text, f"{path} holds {folder}"


def test_files_of_tests_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]  # pytest tells modules apart by them
    assert sorted(names) == sorted(set(names))
