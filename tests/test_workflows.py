"""The workflows run what this checkout has, on every Python that is supported, with no more rights than needed."""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
JOBS = [
    pytest.param(job, id=f"{name}-{key}")
    for name, workflow in WORKFLOWS.items()
    for key, job in workflow["jobs"].items()
]


def commands(job: dict[str, Any]) -> list[str]:
    """What the steps of a job run."""
    return [step["run"] for step in job.get("steps", ()) if "run" in step]


def test_the_suite_runs_on_every_python_that_is_supported():
    matrix = WORKFLOWS["tests"]["jobs"]["suite"]["strategy"]["matrix"]["python"]
    said = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]
    assert matrix == said
    assert PROJECT["requires-python"] == f">={matrix[0]}"


@pytest.mark.parametrize("job", JOBS)
def test_what_a_job_runs_is_here(job):
    if "uses" in job:
        assert (ROOT / job["uses"]).is_file()
    for command in commands(job):
        subprocess.run(["bash", "-n"], input=command, text=True, check=True)
        for script in re.findall(r"(?:^|\s)(\./\S+)", command):
            assert os.access(ROOT / script, os.X_OK), script


@pytest.mark.parametrize("job", JOBS)
def test_a_job_ends_and_may_do_little(job):
    assert "uses" in job or job["timeout-minutes"] <= 150
    assert job.get("permissions", {}) in ({}, {"id-token": "write"})
    assert "secrets." not in str(job)


def test_only_what_was_tested_and_built_is_published():
    assert WORKFLOWS.keys() == {"tests", "release"}
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())
    publish = WORKFLOWS["release"]["jobs"]["publish"]
    assert publish["needs"] == ["tests", "build"]
    assert commands(publish) == []  # what has the right to publish runs nothing of ours


@pytest.mark.parametrize(("tag", "dated", "code"), [("v{}", True, 0), ("v{}", False, 1), ("v9{}", True, 1)])
def test_a_release_is_tagged_and_dated_as_the_package_is(tag, dated, code, tmp_path):
    version = PROJECT["version"]
    (check,) = (each for each in commands(WORKFLOWS["release"]["jobs"]["build"]) if "GITHUB_REF_NAME" in each)
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {version} ({'2026-01-31' if dated else 'unreleased'})\n")
    env = {**os.environ, "GITHUB_REF_NAME": tag.format(version)}
    assert subprocess.run(["bash", "-e", "-c", check], cwd=tmp_path, env=env, check=False).returncode == code
