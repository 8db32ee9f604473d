# SPDX-License-Identifier: Apache-2.0
"""A client that knows only luo-agent's README goes through a whole update unchanged."""

from __future__ import annotations

import json
import os
import select
import signal

from luod_world import World
from readme_client import readme_first_boot, readme_second_boot

from luod.adapters import memfd

TEXT = b"the memory of a guest" * 1000
TOKEN = 0x1A


def first_boot_process(world: World, client: str) -> tuple[int, int]:
    """Start the README client of the first boot; return its pid and a pipe on which it reports."""
    report, report_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(report_end)
        return pid, report
    try:

        def preserve(session: int) -> None:
            fd = memfd.create("ram", len(TEXT))
            os.pwrite(fd, TEXT, 0)
            world.kernel.preserve_fd(session, TOKEN, fd)

        seen = readme_first_boot(
            str(world.socket), client, preserve, lambda: os.write(report_end, b"ready\n")
        )
        os.write(report_end, json.dumps(seen).encode() + b"\n")
    finally:
        os._exit(1)


def ended(pid: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        assert select.select([pidfd], [], [], 30)[0]
        status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        assert status is not None
        return status.si_status
    finally:
        os.close(pidfd)


def test_whole_cycle(world: World) -> None:
    pid, report = first_boot_process(world, "vm1")
    try:
        world.wait_record("session.bound", "vm1.1")
        with world.client() as admin:
            update = world.kexec(admin)
        with open(report, "rb") as pipe:
            assert pipe.readline() == b"ready\n"
            assert pipe.readline() == b"", "the client was not ended by the kexec"
    finally:
        assert ended(pid) == signal.SIGKILL
    world.next_boot()

    def retrieve_finish(session: int) -> bytes:
        fd = world.kernel.retrieve_fd(session, TOKEN)
        try:
            world.kernel.finish(session)
            return os.pread(fd, len(TEXT), 0)
        finally:
            os.close(fd)

    assert readme_second_boot(str(world.socket), "vm1", retrieve_finish) == TEXT
    done = world.wait_record("update.done", update)
    assert done["body"]["finished"] == 1
    with world.client() as admin:
        session = admin.session("vm1")["session"]
    assert session["state"] == "finished"
    assert session["anomalies"] == []
    retrieved = [
        call
        for call in world.control.audit()
        if call["op"] == "RETRIEVE_SESSION" and "vm1" in call["session"]
    ]
    assert len(retrieved) == 1
