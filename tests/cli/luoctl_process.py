# SPDX-License-Identifier: Apache-2.0
"""luoctl as a process, and updates that it takes part in."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luod_world import PATIENCE_S, Puppet, World

from luod.cli.program import run


@dataclass(frozen=True)
class Answer:
    """How luoctl ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, which must be one JSON value and nothing else."""
        return json.loads(self.out)

    def clean(self) -> Answer:
        assert "Traceback" not in self.err, self.err
        return self


class Luoctl:
    """Runs luoctl against a socket: a call within this process, which is quick, or `start` as a process of its own."""

    def __init__(self, socket: Path | None = None) -> None:
        self.socket = socket

    def words(self, given: Sequence[object]) -> list[str]:
        where = ["--socket", str(self.socket)] if self.socket else []
        return [*where, *map(str, given)]

    def __call__(self, *words: object, columns: int = 100) -> Answer:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with environment(columns), redirect_stdout(out), redirect_stderr(err):
            code = run(self.words(words))
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
        return Answer(code, *texts).clean()

    def start(self, *words: object) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "luod.cli", *self.words(words)]
        env = {**os.environ, "PYTHONWARNINGS": "error"}
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


@contextmanager
def environment(columns: int) -> Iterator[None]:
    """A terminal of so many columns, in UTC, whatever the tests are run from."""
    before = dict(os.environ)
    os.environ.update(COLUMNS=str(columns), TZ="UTC")
    os.environ.pop("LUOD_SOCKET", None)
    time.tzset()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        time.tzset()


def ended(process: subprocess.Popen[str]) -> Answer:
    """Wait for the end of a luoctl that was started."""
    out, err = process.communicate(timeout=PATIENCE_S)
    return Answer(process.returncode, out, err).clean()


def whole_update(world: World, luoctl: Luoctl, ids: Sequence[str] = ("vm1", "vm2")) -> Answer:
    """Take clients through an update, kexec asked for by luoctl; return what it said. Everything is finished afterwards."""
    puppets = [Puppet(world) for _ in ids]
    for puppet, id in zip(puppets, ids, strict=True):
        puppet.call("SUBSCRIBE", id=id)
    assert luoctl("load", world.image, "--cmdline", "kho=on liveupdate=on").code == 0
    kexec = luoctl.start("kexec")
    for number, (puppet, id) in enumerate(zip(puppets, ids, strict=True)):
        puppet.event("START_PRESERVATION")
        puppet.preserve(number + 1, f"memory of {id}")
        resource = {"token": f"{number + 1:#x}", "kind": "memfd", "size": 4096, "label": "ram"}
        puppet.call("PRESERVED", id=id, resources=[resource])
        puppet.ask("post", cmd="READY", id=id)
    world.next_boot(*puppets)
    answer = ended(kexec)
    for number, id in enumerate(ids):
        with Puppet(world) as puppet:
            puppet.call("CLAIM", id=id)
            assert puppet.retrieve(number + 1) == f"memory of {id}"
            puppet.finish()
            puppet.call("FINISHED", id=id)
    return answer


def refused_update(world: World, luoctl: Luoctl) -> Answer:
    """Let an update be undone because its only client says no; return what kexec said."""
    with Puppet(world) as puppet:
        puppet.call("SUBSCRIBE", id="vm0")
        assert luoctl("load", world.image, "--cmdline", "kho=on liveupdate=on").code == 0
        kexec = luoctl.start("kexec")
        puppet.event("START_PRESERVATION")
        puppet.call("NACK", id="vm0", errno="EBUSY", message="a device is busy")
        puppet.event("ABORT")
        puppet.drop()
        puppet.call("ABORTED", id="vm0")
        return ended(kexec)


def fingerprint(directory: Path) -> dict[str, str]:
    """Return what every file of a directory holds, to show that nothing was changed, made or removed."""
    return {
        str(path.relative_to(directory)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
