# SPDX-License-Identifier: Apache-2.0
"""What every test relies on: the finder of leaks finds each kind of them, and a disk is a disk."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import anyio
import hypothesis
import pytest
from hypothesis import strategies as st

CONFTEST = Path(__file__).resolve().parent.parent / "conftest.py"

LEAKY = """
import os, subprocess, sys, threading

STAY = [sys.executable, "-c", "import signal; signal.pause()"]
kept = []

def test_fd():
    kept.append(os.memfd_create("forgotten"))

def test_number_used_again():
    fd = os.memfd_create("second")
    os.dup2(fd, kept[0])
    os.close(fd)

def test_child():
    kept.append(subprocess.Popen(STAY))

def test_orphan():
    middle = f"import subprocess; subprocess.Popen({STAY!r})"
    subprocess.run([sys.executable, "-c", middle], check=True)

def test_thread():
    threading.Thread(target=threading.Event().wait, name="forgotten thread", daemon=True).start()

def test_clean():
    for fd in os.pipe():
        os.close(fd)
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    thread = threading.Thread(target=len, args=("",))
    thread.start()
"""

EXPECTED = {
    "test_fd": "/memfd:forgotten (deleted)",
    "test_number_used_again": "/memfd:second (deleted)",
    "test_child": "signal.pause()",
    "test_orphan": "signal.pause()",
    "test_thread": "thread 'forgotten thread' is still running",
}


def load_conftest() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conftest_under_test", CONFTEST)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_every_kind_of_leak_is_found(tmp_path: Path) -> None:
    source = CONFTEST.read_text()
    assert "GRACE_S = 5.0" in source
    (tmp_path / "conftest.py").write_text(source.replace("GRACE_S = 5.0", "GRACE_S = 0.5"))
    (tmp_path / "test_leaky.py").write_text(LEAKY)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    for name, complaint in EXPECTED.items():
        start = next(i for i, line in enumerate(lines) if f"ERROR at teardown of {name} " in line)
        assert complaint in "\n".join(lines[start : start + 6]), result.stdout
    assert f"6 passed, {len(EXPECTED)} errors" in lines[-1], result.stdout


def test_both_ways_of_finding_children_agree() -> None:
    conftest = load_conftest()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in conftest.children_by_search()
        assert child.pid in conftest.children()
        assert child.stdin is not None
        child.stdin.write(b"\n")


MOUNTS = r"""
21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
22 21 0:20 / /tmp rw - tmpfs tmpfs rw
23 22 8:1 / /tmp/real\040disk rw - xfs /dev/sda1 rw
24 21 0:30 / /over rw - ext4 /dev/vdb rw
25 24 0:31 / /over rw - overlay overlay rw,lowerdir=/a
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib", "ext4"),
        ("/tmp", "tmpfs"),
        ("/tmpfile", "ext4"),
        ("/tmp/x/y", "tmpfs"),
        ("/tmp/real disk/y", "xfs"),
        ("/over/y", "overlay"),
    ],
)
def test_file_system_of_a_path(path: str, kind: str) -> None:
    assert load_conftest().filesystem(Path(path), MOUNTS.strip()) == kind


def test_disk_path_is_on_a_disk(disk_path: Path) -> None:
    conftest = load_conftest()
    assert conftest.filesystem(disk_path) not in conftest.VOLATILE
    assert os.listdir(disk_path) == []


def test_dev_shm_would_not_do() -> None:
    conftest = load_conftest()
    assert conftest.filesystem(Path("/proc")) == "proc"
    if os.path.ismount("/dev/shm"):
        assert conftest.filesystem(Path("/dev/shm")) in conftest.VOLATILE


async def test_async_tests_run_on_asyncio_and_leave_nothing() -> None:
    assert anyio.get_cancelled_exc_class().__module__.startswith("asyncio")
    await anyio.to_thread.run_sync(len, "")


@hypothesis.given(st.integers())
def test_hypothesis_accepts_the_fixture(n: int) -> None:
    assert n == int(str(n))


@pytest.mark.parametrize(("ci", "profile"), [("true", "ci"), ("", "quick")])
def test_hypothesis_profile(ci: str, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current = hypothesis.settings.get_current_profile_name()
    monkeypatch.setenv("CI", ci)
    try:
        load_conftest()
        assert hypothesis.settings.get_current_profile_name() == profile
        assert hypothesis.settings().derandomize is (profile == "ci")
        assert hypothesis.settings().deadline is None
    finally:
        hypothesis.settings.load_profile(current)
