# SPDX-License-Identifier: Apache-2.0
"""What `make dist` builds holds the whole package, and works where the tree is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["states", "journal", "engine", "adapters"]
pytestmark = pytest.mark.timeout(300)


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy(tree: Path) -> Path:
    """Copy what the build reads, links as links: building in the tree itself would leave things there."""
    tree.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in [*FOLDERS, "luod"]:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    return tree


def build(tree: Path) -> tuple[Path, Path]:
    """Build the source distribution and, from that, the wheel."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", cwd=tree)
    (wheel,) = (tree / "dist").glob("*.whl")
    (source,) = (tree / "dist").glob("*.tar.gz")
    return wheel, source


def missing(tree: Path, wheel: Path) -> set[str]:
    """Return what a wheel lacks of the package in a tree, seen through its links."""
    links = ["luod", *(f"luod/{folder}" for folder in FOLDERS)]
    found = (path for link in links for path in (tree / link).glob("**/*"))
    wanted = {str(path.relative_to(tree)) for path in found if path.is_file() and path.suffix != ".pyc"}
    with zipfile.ZipFile(wheel) as archive:
        return wanted - set(archive.namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    tree = copy(tmp_path_factory.mktemp("dist") / "tree")
    return tree, *build(tree)


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path, Path]) -> None:
    tree, wheel, _ = built
    assert missing(tree, wheel) == set()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"luod"}
    assert "luod/states/errors.py" in names
    assert "luod/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_source_distribution_holds_the_links_as_folders(built: tuple[Path, Path, Path]) -> None:
    with tarfile.open(built[2]) as archive:
        (found,) = [
            member for member in archive.getmembers() if member.name.endswith("/luod/states/errors.py")
        ]
    assert found.isfile()


IMPORT_ALL = """
import importlib, importlib.metadata, pkgutil, sys
import luod
assert luod.__file__.startswith(sys.prefix), luod.__file__
found = []
for each in pkgutil.walk_packages(luod.__path__, "luod."):
    if not each.name.endswith("__main__"):
        found.append(importlib.import_module(each.name).__name__)
for script in importlib.metadata.distribution("luod").entry_points:
    script.load()
print(*found)
"""


def test_the_wheel_works_outside_the_tree(built: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tree, wheel, _ = built
    fresh = tmp_path / "venv"
    venv.create(fresh, symlinks=True)
    python = fresh / "bin" / "python"
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--disable-pip-version-check",
        "install",
        "--no-index",
        "--no-deps",
    )
    run(*pip, wheel, cwd=tmp_path)
    # The dependencies come from here. Links to this tree do not come along: nested .pth files are not read.
    (packages,) = (fresh / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = run(python, "-I", "-W", "error", "-c", IMPORT_ALL, cwd=Path("/")).split()
    packaged = {
        ".".join(path.relative_to(tree).with_suffix("").parts).removesuffix(".__init__")
        for link in ["luod", *(f"luod/{folder}" for folder in FOLDERS)]
        for path in (tree / link).glob("**/*.py")
        if path.name != "__main__.py"
    }
    assert set(found) == packaged - {"luod"}
    for script in ("luod", "luoctl", "luod-keeper"):
        assert (fresh / "bin" / script).exists()


@pytest.mark.parametrize("change", ["broken link", "folders not found", "data left out"])
def test_a_wheel_that_lacks_something_is_noticed(change: str, tmp_path: Path) -> None:
    tree = copy(tmp_path / "tree")
    settings = (tree / "pyproject.toml").read_text()
    if change == "broken link":
        (tree / "luod" / "states").unlink()
    elif change == "folders not found":
        settings = settings.replace('include = ["luod*"]', 'include = ["luod"]')
    else:
        (tree / "states" / "planted.fragment").touch()
        settings = settings.replace('"*.fragment"', '"nothing"')
    (tree / "pyproject.toml").write_text(settings)
    wheel, _ = build(tree)
    if change == "broken link":
        (tree / "luod" / "states").symlink_to("../states")
    lacking = missing(tree, wheel)
    assert ("luod/states/planted.fragment" if "data" in change else "luod/states/errors.py") in lacking
