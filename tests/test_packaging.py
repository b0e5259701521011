"""What is installed, as a wheel or from a checkout, is all that a user needs: run from an empty folder."""

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL = """
import pyro
import pyro.distributions as dist


def mymodel(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What ``command`` printed; it must succeed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """The ``kind`` ("wheel" or "sdist") of the checkout ``source``, built offline."""
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", out, cwd=source)
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], Path]:
    """The command, the environment in which it runs, and the folder where its package and conf/ must lie."""
    if request.param == "editable":
        svi = Path(sys.executable).parent / "svi"
        if not svi.exists():
            pytest.skip("needs an editable install, which ./scripts/setup makes")
        return svi, {"PYTHONPATH": ""}, ROOT
    site = tmp_path_factory.mktemp("site")
    options = ("-q", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", site)
    run(sys.executable, "-m", "pip", "install", *options, request.getfixturevalue("wheel"), cwd=site)
    return site / "bin" / "svi", {"PYTHONPATH": str(site)}, site  # the rest comes from this Python


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A folder with nothing in it but the user's model."""
    (tmp_path / "mymodule.py").write_text(MODEL)
    return tmp_path


def test_the_wheel_holds_the_package_its_config_its_types_and_its_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        facts = Parser().parsestr(archive.read(metadata).decode())
    for folder, prefix in (("trainer", "trainer"), ("conf", "trainer/conf"), ("hydra_plugins", "hydra_plugins")):
        files = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml", ".typed")]
        assert files
        assert {f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}" for path in files} <= names
    assert "trainer/py.typed" in names
    assert f"{Path(metadata).parent}/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"trainer", "hydra_plugins", Path(metadata).parts[0]}
    assert "hydra_plugins/__init__.py" not in names  # other packages have plugins there too
    assert facts["License-Expression"] == "Apache-2.0"
    required = {line.split(">")[0].split("<")[0] for line in facts.get_all("Requires-Dist", []) if "extra" not in line}
    assert {"torch", "pyro-ppl", "pytorch-lightning", "hydra-core", "webdataset", "wandb"} <= required


def test_the_source_archive_makes_the_same_wheel(wheel, tmp_path):
    with tarfile.open(build("sdist", ROOT, tmp_path)) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    with zipfile.ZipFile(build("wheel", source, tmp_path)) as again, zipfile.ZipFile(wheel) as first:
        assert sorted(again.namelist()) == sorted(first.namelist())


def test_every_library_that_is_imported_is_required():
    """What `trainer` imports is in pyproject.toml, if only in an extra; what comes with it may be imported too."""
    import tomllib
    from importlib.metadata import packages_distributions

    from test_house import MODULES, imports

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    required = {line.split(">")[0].strip().lower() for line in [*project["dependencies"], *extras]}
    through = {"omegaconf": "hydra-core"}
    of_package = packages_distributions()
    for path in MODULES:
        for top in {name.split(".")[0] for name in imports(path.read_text())} - {"trainer", *sys.stdlib_module_names}:
            names = {through.get(name, name).lower() for name in of_package[top]}
            assert names & required, f"{path.name} imports {top} ({', '.join(names)}), which is not required"


def test_the_citation_says_what_the_package_says():
    import tomllib

    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] == "software"
    assert cited["message"]
    assert cited["title"].lower().replace(" ", "-") == project["name"]
    assert all(author["name"] for author in cited["authors"])
    assert cited["authors"]
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"]
    assert cited["abstract"] == project["description"]


@pytest.mark.slow
@pytest.mark.xdist_group("packaging")
def test_installed_it_packs_and_trains_a_model_of_the_current_folder(installed, empty):
    svi, environment, home = installed
    where = "import trainer.cli as cli; print(cli.__file__, cli.config_folder(), sep='\\n')"
    places = [Path(line) for line in run(sys.executable, "-c", where, cwd=empty, **environment).splitlines()]
    assert places[0] == home / "trainer" / "cli.py"
    assert places[1] in (home / "conf", home / "trainer" / "conf")
    usage = run(svi, cwd=empty, **environment)
    assert all(f"  svi {verb}" in usage for verb in ("shard", "train", "verify"))
    run(svi, "shard", "source=synthetic", "model=linear", "rows=2000", "out=shards", cwd=empty, **environment)
    out = run(
        svi, "train", "model._target_=mymodule.mymodel", "data.path=shards", "max_steps=8", "trainer=cpu",
        "program=eager", "run_dir=run", cwd=empty, **environment,
    )  # fmt: skip
    assert "ELBO" in out.splitlines()[-1]
    assert (empty / "run" / "summary.csv").stat().st_size > 0
    assert {path.name for path in empty.iterdir()} - {"__pycache__"} == {"mymodule.py", "shards", "run"}


@pytest.mark.slow
@pytest.mark.xdist_group("packaging")
def test_installed_its_help_lists_every_choice(installed, empty):
    svi, environment, _ = installed
    text = run(svi, "train", "--help", cwd=empty, **environment)
    for group in ("model", "guide", "objective", "optimizer", "schedule", "program", "trainer", "logger"):
        choices = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        assert f"{group}: {', '.join(choices)}" in text
    assert "run_dir:" in text
    assert "OptunaSweeper" in run(svi, "train", "--info", "plugins", cwd=empty, **environment)
