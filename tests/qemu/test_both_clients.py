# SPDX-License-Identifier: Apache-2.0
"""The monitor and the package qemu.qmp ask the same real QEMU the same, and get the same answers."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from qemu.qmp import QMPClient
from qemu.qmp.qmp_client import ExecuteError
from qemu_rig import Rig

from luod.adapters.qemu.errors import CommandRefused
from luod.adapters.qemu.monitor import Monitor

pytestmark = pytest.mark.lab

QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("query-version", {}),
    ("query-status", {}),
    ("query-memdev", {}),
    ("query-qmp-schema", {}),
    ("query-block", {}),
    ("query-migrate-parameters", {}),
    ("qom-list", {"path": "/machine"}),
    ("qom-get", {"path": "/machine", "property": "type"}),
    ("human-monitor-command", {"command-line": "info version"}),
    ("qom-get", {"path": "/nowhere", "property": "type"}),
    ("no-such-command", {}),
    ("migrate", {"uri": "file:/dev/fdset/77"}),
    ("migrate", {"uri": "nosuch:/x"}),
    ("migrate-set-parameters", {"mode": "cpr-nothing"}),
    ("query-status", {"more": 'than "needed" äöü \u2603'}),
]


def ours(monitor: Monitor) -> list[Any]:
    answers: list[Any] = []
    for command, arguments in QUESTIONS:
        try:
            answers.append(monitor.ask(command, arguments, timeout_s=30))
        except CommandRefused as error:
            answers.append((error.error_class, error.desc))
    return answers


async def theirs(path: str) -> tuple[Any, list[Any]]:
    client = QMPClient()
    await client.connect(path)
    answers: list[Any] = []
    try:
        for command, arguments in QUESTIONS:
            try:
                answers.append(await client.execute(command, arguments))
            except ExecuteError as error:
                answers.append((error.error_class, str(error)))
        assert client.greeting is not None
        return client.greeting.QMP.version, answers
    finally:
        await client.disconnect()


def test_both_get_the_same_answers(rig: Rig) -> None:
    process = rig.start("-S")
    mine = ours(rig.guest.monitor)
    version = rig.guest.monitor.greeting.version
    rig.guest.detach()
    greeting, others = asyncio.run(theirs(str(process.monitor_path)))
    assert mine == others
    assert version == ".".join(str(greeting["qemu"][part]) for part in ("major", "minor", "micro"))
    assert sum(isinstance(answer, tuple) for answer in mine) == 6


def test_a_descriptor_reaches_the_command_that_it_was_sent_with(rig: Rig) -> None:
    """From eight threads at once, on a real QEMU: each set holds the file that it was meant to."""
    from concurrent.futures import ThreadPoolExecutor

    process = rig.start("-S")
    fds = [os.memfd_create(f"m{n}") for n in range(40)]
    try:
        with ThreadPoolExecutor(8) as pool:
            sets = list(pool.map(lambda fd: rig.guest.ask("add-fd", (fd,), opaque=str(fd)), fds))
        for fd, made in zip(fds, sets, strict=True):
            theirs = os.stat(f"/proc/{process.pid}/fd/{made['fd']}")
            assert theirs.st_ino == os.fstat(fd).st_ino
        rig.guest.withdraw(rig.guest.fdsets(lambda _: True))
        assert rig.guest.ask("query-fdsets") == []
    finally:
        for fd in fds:
            os.close(fd)
