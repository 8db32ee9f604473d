# SPDX-License-Identifier: Apache-2.0
"""House rules that no tool knows: licence headers, sizes, names, paths and waiting. Each is shown to notice a planted breach."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = ["states", "journal", "engine", "adapters", "luod", "tests", "bench", "docs", "packaging", ".ci"]
MADE = {"__pycache__", "_build", "build"}
CODE = {
    ".py",
    ".pyi",
    ".sh",
    ".c",
    ".h",
    ".toml",
    ".lock",
    ".mk",
    ".yml",
    ".yaml",
    ".service",
    ".socket",
    ".conf",
    ".fragment",
}
TEXT = CODE | {".md", ".rst", ".txt", ".json", ".jsonl", ".mmd", ".cfg", ""}

LICENCE = "SPDX-License-Identifier: Apache-2.0"
MAX_LINES = 600
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "manager", "managers", "misc", "common"}
WORKPLACE = re.compile(r"(?<![\w./])/(?:work/(?:main|shared)\b|root/\w|home/\w|tmp/luod/|opt/pypi)")


def files(root: Path) -> Iterator[Path]:
    """Yield every file of the project, once: links and what builds have made are passed over."""
    for path in sorted(root.iterdir()):
        if path.is_file() and (path.suffix in TEXT and not path.name.startswith(".git")):
            yield path
    for place in PLACES:
        yield from below(root / place)


def below(directory: Path) -> Iterator[Path]:
    if not directory.is_dir() or directory.is_symlink() or directory.name in MADE:
        return
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from below(path)
        elif path.is_file() and not path.is_symlink():
            yield path


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.suffix in TEXT else ""


def is_code(path: Path) -> bool:
    return path.suffix in CODE or path.name == "Makefile" or path.read_bytes().startswith(b"#!")


def licences(root: Path) -> list[str]:
    """Every file of code names its licence in its first three lines."""
    return [
        f"{path.relative_to(root)}: has no '{LICENCE}' in its first three lines"
        for path in files(root)
        if is_code(path) and path.stat().st_size and LICENCE not in "".join(text(path).splitlines()[:3])
    ]


def lengths(root: Path) -> list[str]:
    """No module is longer than one can keep in mind."""
    counted = ((path, len(text(path).splitlines())) for path in files(root) if path.suffix == ".py")
    return [
        f"{path.relative_to(root)}: {n} lines, at most {MAX_LINES}" for path, n in counted if n > MAX_LINES
    ]


def words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def names(root: Path) -> list[str]:
    """No module, class or function has a name that would fit any other as well."""
    found = []
    for path in files(root):
        if path.suffix != ".py":
            continue
        place = path.relative_to(root)
        given = dict.fromkeys(place.with_suffix("").parts, 1)
        for node in ast.walk(ast.parse(text(path), str(path))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                given[node.name] = node.lineno
        found += [
            f"{place}:{line}: {name} says nothing"
            for name, line in given.items()
            if words(name) & EMPTY_NAMES
        ]
    return found


def workplaces(root: Path) -> list[str]:
    """No file knows the machine it was written on."""
    return [
        f"{path.relative_to(root)}:{number}: a path of somebody's machine: {match[0]}"
        for path in files(root)
        for number, line in enumerate(text(path).splitlines(), 1)
        if (match := WORKPLACE.search(line))
    ]


def waits(root: Path) -> list[str]:
    """No test waits for time to pass: it waits for what it needs, by fd, pidfd, event or process exit."""
    found = []
    for path in below(root / "tests"):
        if path.suffix != ".py":
            continue
        place, source = path.relative_to(root), text(path)
        # In text, so that programs which tests keep in strings are seen too.
        found += [
            f"{place}:{number}: sleeping"
            for number, line in enumerate(source.splitlines(), 1)
            if re.search(r"\btime\.sleep\(|\bfrom time import .*\bsleep\b", line)
        ]
        found += [
            f"{place}:{node.lineno}: sleep of an event loop"
            for node in ast.walk(ast.parse(source, str(path)))
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("asyncio.sleep", "anyio.sleep")
            and not (node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0)
        ]
    return found


RULES: list[Callable[[Path], list[str]]] = [licences, lengths, names, workplaces, waits]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[Path], list[str]]) -> None:
    if found := rule(ROOT):
        pytest.fail(f"{rule.__doc__}\n  " + "\n  ".join(found), pytrace=False)


def test_the_rules_see_the_project() -> None:
    seen = {str(path.relative_to(ROOT)) for path in files(ROOT)}
    assert {
        "pyproject.toml",
        "Makefile",
        "states/errors.py",
        "luod/__init__.py",
        "tests/conftest.py",
        ".ci/venv",
    } <= seen
    assert not {name for name in seen if name.startswith("luod/states/")}


HEADER = f"# {LICENCE}\n"
BREACHES = [
    (licences, "engine/bare.py", "x = 1\n"),
    (licences, ".ci/bare", "#!/bin/sh\ntrue\n"),
    (licences, "Makefile", "all:\n"),
    (licences, "luod/late.py", "\n\n\n" + HEADER),
    (lengths, "states/long.py", HEADER + "x = 1\n" * MAX_LINES),
    (names, "journal/utils.py", HEADER),
    (names, "adapters/common/x.py", HEADER),
    (names, "engine/x.py", HEADER + "class SessionManager:\n    pass\n"),
    (names, "engine/x.py", HEADER + "async def _fold_helper():\n    pass\n"),
    (workplaces, "docs/x.md", "see /wor" + "k/main/luod\n"),
    (workplaces, "tests/x.py", HEADER + "P = '/ro" + "ot/thing'\n"),
    (workplaces, ".ci/x", "#!/bin/sh\n" + HEADER + "cd /ho" + "me/me\n"),
    (waits, "tests/a/test_x.py", HEADER + "time" + ".sleep(1)\n"),
    (waits, "tests/a/test_x.py", HEADER + "PROGRAM = 'import time; time" + ".sleep(9)'\n"),
    (waits, "tests/a/test_x.py", HEADER + "from ti" + "me import sleep\n"),
    (waits, "tests/a/test_x.py", HEADER + "async def test(): await anyio.sleep(0.1)\n"),
]


@pytest.mark.parametrize(
    ("rule", "name", "content"), BREACHES, ids=lambda v: getattr(v, "__name__", None) or str(v)[:24]
)
def test_breach_is_noticed(
    rule: Callable[[Path], list[str]], name: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    found = rule(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(name)
    assert [other.__name__ for other in RULES if other is not rule and other(tmp_path)] == []


def test_the_blameless_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "x.py").write_text(
        HEADER
        + "from contextlib import contextmanager\nasync def test(): await anyio.sleep(0); await anyio.sleep_forever()\n"
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "x.md").write_text(
        "put it into /var/lib/luod, /work/mainly, $HOME/x or /homestead\n"
    )
    assert [found for rule in RULES for found in rule(tmp_path)] == []
