"""A test that cannot run says what it needs, and the end of the output how many need it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_every_skip_says_what_it_needs():
    for path in HERE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("skip", "skipif", "importorskip"):
                words = [str(each.value) for each in ast.walk(node) if isinstance(each, ast.Constant)]
                assert any(word.startswith("needs ") for word in words), f"{path}, line {node.lineno}"


@pytest.mark.slow
def test_skipped_tests_are_counted_by_what_they_need(tmp_path: Path):
    """Two that need a moon and one that needs a sea, under the conftest.py of all tests."""
    (tmp_path / "test_here.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('number', [1, 2])\n"
        "def test_moon(number): pytest.skip('needs a moon')\n"
        "@pytest.mark.skipif(True, reason='needs a sea')\n"
        "def test_sea(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE / 'tools'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-3:-1] == ["2 skipped: needs a moon", "1 skipped: needs a sea"]
