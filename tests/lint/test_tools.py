# SPDX-License-Identifier: Apache-2.0
"""Lint, format, types and spelling of the whole tree; and for each tool, a planted fault that it must find in every folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["states", "journal", "engine", "adapters", "luod"]
PROSE = [
    *FOLDERS,
    "tests",
    "bench",
    "docs",
    "packaging",
    ".ci",
    "Makefile",
    "pyproject.toml",
    *sorted(p.name for p in ROOT.glob("*.md")),
]

RUFF_CHECK = ["ruff", "check", "--no-cache", "--output-format", "concise", "."]
RUFF_FORMAT = ["ruff", "format", "--no-cache", "--check", "."]
MYPY = ["mypy", "--no-error-summary"]
PYRIGHT = ["pyright", "--pythonpath", sys.executable, "--outputjson"]
CODESPELL = ["codespell_lib"]


def run(command: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, check=False
    )


def require_clean(result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode:
        pytest.fail(
            f"{' '.join(result.args[2:])} exits {result.returncode}\n{result.stdout}{result.stderr}",
            pytrace=False,
        )


def test_ruff_check() -> None:
    require_clean(run(RUFF_CHECK))


def test_ruff_format() -> None:
    require_clean(run(RUFF_FORMAT))


@pytest.mark.timeout(300)
def test_mypy() -> None:
    require_clean(run(MYPY))


def pyright(cwd: Path) -> tuple[list[str], int]:
    """Return the complaints and the number of files that were looked at."""
    result = run(PYRIGHT, cwd)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    found = json.loads(result.stdout)
    complaints = [
        f"{Path(each['file']).relative_to(cwd.resolve())}:{each.get('range', {}).get('start', {}).get('line', -1) + 1}:"
        f" {each['message']} ({each.get('rule', each['severity'])})"
        for each in found["generalDiagnostics"]
    ]
    return complaints, found["summary"]["filesAnalyzed"]


@pytest.mark.timeout(300)
def test_pyright() -> None:
    complaints, looked_at = pyright(ROOT)
    if complaints:
        pytest.fail(f"{len(complaints)} complaints\n" + "\n".join(complaints), pytrace=False)
    there = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert looked_at >= len(there), "pyright passed over some of the files"


def test_codespell() -> None:
    require_clean(run([*CODESPELL, *(name for name in PROSE if (ROOT / name).exists())]))


PLANTED = '''\
# SPDX-License-Identifier: Apache-2.0
"""A planted fault."""

from __future__ import annotations

{fault}
'''


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Lay out a small tree like this one, under this tree's settings."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(PLANTED.format(fault="").rstrip() + "\n")
    (tmp_path / "luod" / "py.typed").touch()
    for folder in FOLDERS[:-1]:
        (tmp_path / "luod" / folder).symlink_to(Path("..", folder))
    return tmp_path


def plant(tree: Path, fault: str) -> None:
    for folder in FOLDERS:
        (tree / folder / "planted.py").write_text(PLANTED.format(fault=fault))


def test_the_empty_tree_is_clean(planted: Path) -> None:
    for command in (RUFF_CHECK, RUFF_FORMAT, MYPY, [*CODESPELL, *FOLDERS]):
        require_clean(run(command, planted))
    assert pyright(planted)[0] == []


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("import os", "F401"),
        ("def public():\n    return 1", "D103"),
        ("import states.errors", "TID251"),
        ('print("' + "x " * 80 + '")', "E501"),
    ],
)
def test_ruff_check_finds(planted: Path, fault: str, rule: str) -> None:
    plant(planted, fault)
    result = run(RUFF_CHECK, planted)
    assert result.returncode == 1
    for folder in FOLDERS if rule != "TID251" else ["luod"]:
        assert any(
            line.startswith(f"{folder}/planted.py:") and rule in line for line in result.stdout.splitlines()
        ), folder


def test_ruff_format_finds(planted: Path) -> None:
    plant(planted, "x = {  'a':1 }")
    result = run(RUFF_FORMAT, planted)
    assert result.returncode == 1
    assert f"{len(FOLDERS)} files would be reformatted" in result.stdout


@pytest.mark.parametrize("fault", ['x: int = "no"', "def f(x):  # type\n    return x"])
def test_mypy_finds(planted: Path, fault: str) -> None:
    plant(planted, fault)
    result = run(MYPY, planted)
    assert result.returncode == 1
    for folder in FOLDERS:
        place = "luod/planted.py:" if folder == "luod" else f"luod/{folder}/planted.py:"
        assert any(line.startswith(place) for line in result.stdout.splitlines()), folder


@pytest.mark.parametrize("fault", ['x: int = "no"', "def f(x):\n    return x"])
def test_pyright_finds(planted: Path, fault: str) -> None:
    plant(planted, fault)
    complaints, _ = pyright(planted)
    for folder in FOLDERS:
        assert any(each.startswith(f"{folder}/planted.py:") for each in complaints), folder


def test_codespell_finds(planted: Path) -> None:
    plant(planted, '"""It is wri' + 'ten."""')
    result = run([*CODESPELL, *FOLDERS], planted)
    assert result.returncode != 0
    for folder in FOLDERS:
        assert f"{folder}/planted.py:6: wri" + "ten" in result.stdout
