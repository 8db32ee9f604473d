# SPDX-License-Identifier: Apache-2.0
"""The arrows between the folders point one way, the links lead where they should, and no folder imports by its bare name."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["states", "journal", "engine", "adapters"]

# What each folder may import of ours, besides itself.
ARROWS: dict[str, set[str]] = {
    "states": set(),
    "journal": {"states"},
    "engine": {"states", "journal"},
    "adapters": {"states.errors", "engine.ports"},
}


def imported(module: str, source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield line, absolute name, and whether it was written relatively, of all that a module imports anywhere in its body."""
    package = module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, False
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            else:
                base = node.module or ""
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}", node.level > 0


def allowed(folder: str, name: str) -> bool:
    return any(name == each or name.startswith(each + ".") for each in {folder} | ARROWS[folder])


def breaches(root: Path) -> list[str]:
    found = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            place = path.relative_to(root)
            # An __init__ counts as a module of its package, so that one dot is the package itself.
            module = ".".join(["luod", *place.with_suffix("").parts])
            for line, name, relative in imported(module, path.read_text()):
                top, _, rest = name.partition(".")
                if top in FOLDERS:
                    found.append(f"{place}:{line}: {name} by its bare name")
                elif top == "luod" and not relative:
                    found.append(f"{place}:{line}: {name} is not imported relatively")
                elif top == "luod" and not allowed(folder, rest):
                    found.append(f"{place}:{line}: {folder} must not know {name}")
    return found


def test_arrows_point_one_way() -> None:
    if found := breaches(ROOT):
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("states/x.py", "from ..journal import store"),
        ("states/x.py", "from .. import journal"),
        ("states/x.py", "from .. import __version__"),
        ("states/deep/x.py", "from ...engine.ports import Kernel"),
        ("states/__init__.py", "from ..luod import cli"),
        ("journal/x.py", "from ..engine.ports import Kernel"),
        ("journal/x.py", "def f():\n    from ..adapters import memfd"),
        ("engine/x.py", "from ..adapters.memfd import create"),
        ("engine/x.py", "import luod.states"),
        ("engine/x.py", "from luod.states.errors import LuodError"),
        ("engine/x.py", "from ..daemon import core"),
        ("engine/x.py", "import states.errors"),
        ("adapters/x.py", "from ..states.events import encode"),
        ("adapters/x.py", "from ..states import errors_of_mine"),
        ("adapters/x.py", "from ..engine.runner import Engine"),
        ("adapters/deep/x.py", "from ...journal.store import Store"),
        ("adapters/x.py", "if TYPE_CHECKING:\n    from ..journal import store"),
    ],
)
def test_a_wrong_arrow_is_noticed(name: str, line: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(line + "\n")
    assert len(breaches(tmp_path)) == 1


def test_right_arrows_pass(tmp_path: Path) -> None:
    right = {
        "states/x.py": "from . import errors\nfrom .errors import LuodError\nimport msgspec\nfrom collections import abc",
        "journal/x.py": "from ..states.errors import LuodError\nfrom ..states import events\nfrom .store import Store",
        "engine/x.py": "from ..states import table\nfrom ..journal.writer import Journal\nfrom .ports import Kernel",
        "engine/__init__.py": "from .ports import Kernel",
        "adapters/deep/x.py": "from ...states.errors import LuodError\nfrom ...engine.ports import Kernel\nfrom .. import memfd",
        "adapters/x.py": "from ..states import errors\nfrom .deep.x import y\nimport statesmen",
        "luod/x.py": "from .engine import ports",
    }
    for name, source in right.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source + "\n")
    assert breaches(tmp_path) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_link_is_relative(folder: str) -> None:
    assert os.readlink(ROOT / "luod" / folder) == f"../{folder}"
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder).is_symlink()


def test_links_are_committed_as_links() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout: the links themselves are looked at by the other test")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-s", *(f"luod/{folder}" for folder in FOLDERS)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted((line.split()[0], line.split("\t")[1]) for line in listed) == [
        ("120000", f"luod/{folder}") for folder in sorted(FOLDERS)
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_name_does_not_import(folder: str) -> None:
    """A second copy of a module, with other classes of the same names, would catch no error and match no type."""
    result = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, (
        f"'import {folder}' works from the root of the tree: let {folder}/__init__.py refuse it"
    )
    assert "ImportError" in result.stderr


def test_tests_see_the_package_only_by_its_name() -> None:
    assert str(ROOT) not in sys.path
    assert not {name for name in sys.modules if name.partition(".")[0] in FOLDERS}
