# SPDX-License-Identifier: Apache-2.0
"""The documentation builds without a warning, and what it shows is what happens.

A console block after the line `<!-- run -->` is run: each `$ command` in one new directory, one after the other, and what it prints is
compared, where `...` stands for anything. `<!-- run: exit 1 -->` says how the last command ends. The directory holds a copy of
`docs/examples/`; each of these programs is shown on a page by `literalinclude` and run in a console block.
"""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md")) + [page for page in [ROOT / "README.md"] if page.exists()]
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))

BLOCK = re.compile(
    r"^<!-- run(?:: exit (?P<exit>\d+))? -->\n+```console\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Console:
    """One console block: commands, each with what it should print."""

    place: str
    steps: tuple[tuple[str, str], ...]
    exit: int


def consoles(name: str, page: str) -> list[Console]:
    found = []
    for match in BLOCK.finditer(page):
        steps: list[tuple[str, str]] = []
        for line in match["text"].splitlines(keepends=True):
            if line.startswith("$ "):
                steps.append((line[2:].rstrip("\n"), ""))
            else:
                assert steps, f"{name}: a console block begins with '$ '"
                steps[-1] = (steps[-1][0], steps[-1][1] + line)
        place = f"{name}:{page.count(chr(10), 0, match.start()) + 1}"
        found.append(Console(place, tuple(steps), int(match["exit"] or 0)))
    return found


def play(console: Console, cwd: Path) -> str:
    """Run a console block; return what is different, or nothing."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "/usr/bin:/bin")])
    env = {
        **os.environ,
        "PATH": path,
        "HOME": str(cwd),
        "NO_COLOR": "1",
        "COLUMNS": "100",
        "PYTHONWARNINGS": "error",
    }
    for number, (command, expected) in enumerate(console.steps, 1):
        result = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        wanted = console.exit if number == len(console.steps) else 0
        if result.returncode != wanted:
            return f"$ {command}\n{result.stdout}exit code {result.returncode}, not {wanted}"
        if not doctest.OutputChecker().check_output(expected, result.stdout, doctest.ELLIPSIS):
            return f"$ {command}\nshould print\n{expected}but prints\n{result.stdout}"
    return ""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_consoles(page: Path, disk_path: Path) -> None:
    for number, console in enumerate(consoles(page.name, page.read_text())):
        cwd = disk_path / str(number)
        shutil.copytree(DOCS / "examples", cwd)
        if difference := play(console, cwd):
            pytest.fail(f"{console.place}: {difference}", pytrace=False)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_shown_and_run(example: Path) -> None:
    assert any(f"{{literalinclude}} examples/{example.name}" in page.read_text() for page in PAGES), (
        "no page shows it"
    )
    commands = [
        step[0] for page in PAGES for each in consoles(page.name, page.read_text()) for step in each.steps
    ]
    assert any(f"python {example.name}" in command for command in commands), "no console block runs it"


def sphinx(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html", source, out]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)
def test_docs_build(tmp_path: Path) -> None:
    result = sphinx(DOCS, tmp_path / "html")
    assert result.returncode == 0, result.stderr
    for page in DOCS.glob("*.md"):
        assert (tmp_path / "html" / f"{page.stem}.html").exists()
    index = (tmp_path / "html" / "index.html").read_text()
    assert all(f'href="{page.stem}.html"' in index for page in DOCS.glob("*.md") if page.stem != "index")


FAULTS = {
    "see [there](nowhere.md)": "nowhere",
    "see [there](architecture.md#no-such-heading)": "no-such-heading",
    "```{literalinclude} examples/none.py\n```": "none.py",
    "```{no-such-directive}\n```": "no-such-directive",
}


@pytest.mark.timeout(300)
def test_faults_in_pages_stop_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("conf.py", "index.md", "architecture.md", "states.md"):
        shutil.copy(DOCS / name, tmp_path / "docs")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for number, fault in enumerate(FAULTS):
        (tmp_path / "docs" / f"planted{number}.md").write_text(f"# Planted\n\n{fault}\n")
    bad = sphinx(tmp_path / "docs", tmp_path / "bad")
    assert bad.returncode != 0
    for number, complaint in enumerate(FAULTS.values()):
        assert any(f"planted{number}.md" in line and complaint in line for line in bad.stderr.splitlines()), (
            bad.stderr
        )
    assert bad.stderr.count("WARNING") + bad.stderr.count("ERROR") == len(FAULTS), (
        "and nothing else is complained about"
    )


PAGE = """\
text

<!-- run{exit} -->
```console
$ mkdir d && cd d && pwd
...
$ {command}
{output}
```

```console
$ false
```
"""


@pytest.mark.parametrize(
    ("command", "output", "exit_", "fine"),
    [
        ("echo one; echo two", "one\ntwo", "", True),
        ("echo one two three", "one ... three", "", True),
        ("echo one >&2; exit 3", "one", ": exit 3", True),
        ("ls -d d", "d", "", True),
        ("echo one", "two", "", False),
        ("echo one; echo two", "one", "", False),
        ("echo one; exit 3", "one", "", False),
        ("echo one", "one", ": exit 3", False),
        ("read line || echo none", "none", "", True),
    ],
)
def test_console_blocks_are_compared(
    command: str, output: str, exit_: str, fine: bool, tmp_path: Path
) -> None:
    (console,) = consoles("page.md", PAGE.format(command=command, output=output, exit=exit_))
    assert console.place == "page.md:3"
    assert (play(console, tmp_path) == "") is fine
