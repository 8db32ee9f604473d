# SPDX-License-Identifier: Apache-2.0
"""What every test gets: no leaks, one asyncio backend, a directory on a real disk, and settled Hypothesis profiles."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
VOLATILE = frozenset({"tmpfs", "ramfs", "overlay", "nfs", "nfs4", "9p", "squashfs", "aufs", "fuse.sshfs"})
GRACE_S = 5.0
PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h

# In CI the same examples every time, so that a red run means a change; at home new ones, so that bugs are found.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("quick", max_examples=50, deadline=None, derandomize=False)
settings.load_profile("ci" if os.environ.get("CI") else "quick")


def pytest_configure() -> None:
    # A runner in the background ignores Ctrl-C, and so would every program that a test starts and interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Orphans of a program under test fall to this process, where `no_leaks` sees them, instead of to init.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@dataclass(frozen=True)
class Holdings:
    """What this process holds that a test must give back."""

    fds: frozenset[tuple[int, str]]
    children: frozenset[int]
    threads: frozenset[threading.Thread]

    @classmethod
    def now(cls) -> Holdings:
        fds = set()
        for name in os.listdir("/proc/self/fd"):
            # The descriptor by which the directory is listed is closed by now.
            with contextlib.suppress(FileNotFoundError):
                fds.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        return cls(frozenset(fds), frozenset(children()), frozenset(threading.enumerate()))


def children() -> set[int]:
    """Return the pids of the direct children, dead ones that nobody waited for included."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        try:
            with contextlib.suppress(ProcessLookupError):
                found |= {int(pid) for pid in Path("/proc/self/task", task, "children").read_text().split()}
        except FileNotFoundError:
            if Path("/proc/self/task", task).exists():  # so it is a kernel without CONFIG_PROC_CHILDREN
                return children_by_search()
    return found


def children_by_search() -> set[int]:
    """Return what `children` does by asking every process for its parent."""
    me, found = os.getpid(), set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                stat = Path("/proc", name, "stat").read_text(errors="replace")
                if int(stat.rpartition(")")[2].split()[1]) == me:
                    found.add(int(name))
    return found


def outlives(pid: int, grace_s: float) -> bool:
    """Wait for a child to end and reap it; return whether it is still running after the grace."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if not select.select([pidfd], [], [], grace_s)[0]:
            return True
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        return False
    finally:
        os.close(pidfd)


def leaks(before: Holdings, grace_s: float = GRACE_S) -> list[str]:
    """Compare with what was held before; return one line for each thing left over, and put an end to leftover processes."""
    found = []
    for thread in set(threading.enumerate()) - before.threads:
        thread.join(grace_s)
        if thread.is_alive():
            found.append(f"thread {thread.name!r} is still running")
    for pid in children() - before.children:
        if outlives(pid, grace_s):
            # Only read now: for a moment after it was started, a process has no command line yet.
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")[:200]
            found.append(f"process {pid} is still running: {command.decode(errors='replace')}")
            os.kill(pid, signal.SIGKILL)
            outlives(pid, grace_s)
    if Holdings.now().fds - before.fds:
        gc.collect()  # what only a reference cycle holds is closed now, and warns for itself
    found += [f"fd {fd} is still open: {what}" for fd, what in sorted(Holdings.now().fds - before.fds)]
    return found


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail the test that leaves a descriptor open, a process or a thread running."""
    before = Holdings.now()
    yield
    if found := leaks(before):
        pytest.fail("the test left behind:\n  " + "\n  ".join(found), pytrace=False)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Pin the backend: QMP and the state machine library know asyncio only."""
    return "asyncio"


def filesystem(path: Path, mountinfo: str | None = None) -> str:
    """Return the type of the file system that a path lies on."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    best, kind = -1, ""
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        mountpoint = Path(fields.split()[4].replace("\\040", " "))
        # A later line covers an earlier one at the same place.
        if path.resolve().is_relative_to(mountpoint) and len(mountpoint.parts) >= best:
            best, kind = len(mountpoint.parts), rest.split()[0]
    return kind


@pytest.fixture
def disk_path(tmp_path: Path) -> Iterator[Path]:
    """Give an empty directory on a file system that keeps what it was given: journals refuse the others.

    Taken from the first that is real: pytest's own, $LUOD_TEST_DIR, build/ of this tree, /var/tmp.
    """
    if filesystem(tmp_path) not in VOLATILE:
        yield tmp_path
        return
    (ROOT / "build").mkdir(exist_ok=True)
    places = [Path(os.environ["LUOD_TEST_DIR"])] if "LUOD_TEST_DIR" in os.environ else []
    for place in [*places, ROOT / "build", Path("/var/tmp")]:
        if place.is_dir() and filesystem(place) not in VOLATILE:
            directory = Path(tempfile.mkdtemp(prefix="t-", dir=place))
            try:
                yield directory
            finally:
                shutil.rmtree(directory)
            return
    pytest.fail("no directory on a real disk: name one in LUOD_TEST_DIR", pytrace=False)
