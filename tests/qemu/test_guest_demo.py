# SPDX-License-Identifier: Apache-2.0
"""Guests of a host on the emulated kernel, with real QEMUs: one, four and sixteen, in order, and one that cannot follow."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from luod.client import Client
from luod.demo.guest_run import GuestRun, usable
from luod.demo.guests import GuestSetting, SerialPort, report
from luod.tinyguest.serial import SerialLog

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]
SMALL = GuestSetting(mib=8, before=5)


def times(link: Client, kind: str) -> dict[str, int]:
    """Return when a kind of event happened first in each stream, in nanoseconds of the boot clock."""
    found: dict[str, int] = {}
    for record in link.records():
        if record["type"].startswith(f"{kind}.v"):
            found.setdefault(record["stream"], record["boot_ns"])
    return found


@pytest.mark.parametrize("guests", [1, 4, 16])
def test_so_many_guests_live_through_an_update(guests: int) -> None:
    command = [
        sys.executable,
        "-m",
        "luod.cli",
        "demo",
        "--qemu",
        "--json",
        "--sessions",
        str(guests),
        "--mib",
        "8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["sessions"], told["finished"], told["detail"]["problems"]) == (guests, guests, [])
    assert told["bytes_verified"] == guests * (8 << 20)
    for guest in told["guests"]:
        assert guest["last"] > guest["last_before"] >= 20
        parts = list(guest["blackout"])
        assert parts[:3] == ["pause", "save", "preserve"]
        assert {"kexec", "retrieve", "start", "load", "resume"} <= set(parts)


def test_who_is_first_and_how_many_at_a_time(disk_path: Path) -> None:
    config = disk_path / "luod.toml"
    config.write_text("[order]\nfreeze_at_once = 1\nrestore_at_once = 1\nwait_s = 60\n", encoding="ascii")
    run = GuestRun(
        disk_path / "host", 3, SMALL, qemus=(usable(), usable()), config=config,
        options=lambda number: ["--order", "10" if number == 0 else "0"],
    )  # fmt: skip
    try:
        run.start_first()
        assert run.order_update() == "kexec"
        run.start_second()
        run.finish_update()
        with run.link() as link:
            ready, back = times(link, "session.ready"), times(link, "session.retrieved")
            restored = times(link, "session.restored")
        run.judge_guests()
        run.stop_guests()
        run.look()
    finally:
        run.stop()
    assert run.problems() == []
    assert max(ready, key=lambda name: ready[name]) == "vm0.1", "stopped last"
    assert min(back, key=lambda name: back[name]) == "vm0.1", "back first"
    order = sorted(back, key=lambda name: back[name])
    for one, after in pairwise(order):
        assert restored[one] < back[after], "one at a time"


def test_a_guest_that_is_optional_does_not_stop_the_others(disk_path: Path) -> None:
    """Its disk loses what the host has not written yet, so it cannot go; the others do, and it starts anew."""
    disk = disk_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    run = GuestRun(
        disk_path / "host", 3, SMALL, qemus=(usable(), usable()),
        options=lambda number: ["--policy", "optional" if number == 1 else "required"],
        devices=lambda number: ["-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"] if number == 1 else [],
    )  # fmt: skip
    try:
        run.start_first()
        assert run.order_update() == "kexec"
        run.start_second()
        update = run.finish_update()
        last, passes = run.before[0]
        run.until_ticking(0, last + 1, passes + 2)
        run.until_ticking(2, run.before[2][0] + 1, run.before[2][1] + 2)
        run.ports[1].until_boots(2, 60.0)
        with run.link() as link:
            refused = link.session("vm1.1")["session"]
        run.stop_guests()
    finally:
        run.stop()
    assert (sorted(update["sessions"]), update["dropped"]) == (["vm0.1", "vm2.1"], ["vm1.1"])
    assert "cache=unsafe" in refused["reason"]
    for number in (0, 2):
        log, (last, passes) = run.ports[number].look(), run.before[number]
        assert report(f"vm{number}", log, last, passes, 1).findings == ()


def story(*lines: str) -> SerialLog:
    log = SerialLog()
    log.feed(
        "".join(
            f"{line}\n" for line in ("tinyguest boot seed 1 memory 8192 hz 20 chunk 512", *lines)
        ).encode()
    )
    return log


def ticks(first: int, last: int, passes: int = 0) -> list[str]:
    return [f"tick {number} pass {passes} bad 0 seed 1" for number in range(first, last + 1)]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (ticks(1, 9, 2), ""),
        ([*ticks(1, 5), *ticks(5, 9, 2)], "repeated"),
        ([*ticks(1, 5), *ticks(7, 9, 2)], "lost"),
        ([*ticks(1, 5), "tick 6 pass 2 bad 3 seed 1"], "wrong"),
        ([*ticks(1, 5), "tinyguest boot seed 1 memory 8192 hz 20 chunk 512", *ticks(1, 9, 2)], "booted again"),
        ([*ticks(1, 5), *(line.replace("seed 1", "seed 2") for line in ticks(6, 9, 2))], "another guest"),
        (ticks(1, 9, 1), "not checked whole"),
        (ticks(1, 5, 2), "no tick after 5"),
    ],
)  # fmt: skip
def test_a_guest_that_did_not_live_through_it_is_found_out(lines: list[str], words: str) -> None:
    """The mutants of the judge: each kind of broken update shows."""
    found = report("vm0", story(*lines), 5, 0, 8 << 20)
    assert (not found.findings) if not words else any(words in one for one in found.findings)
    assert bool(found.bytes) is ("wrong" not in words and "whole" not in words)


def test_a_log_that_grows_is_read_once(tmp_path: Path) -> None:
    port = SerialPort(tmp_path / "serial")
    assert port.look().last == 0
    with port.path.open("ab", buffering=0) as file:
        file.write(b"tinyguest boot seed 4 memory 8192 hz 20 chunk 512\ntick 1 pass 0 ba")
        assert port.look().last == 0
        file.write(b"d 0 seed 4\n")
        assert (port.look().last, port.log.seed, port.log.findings) == (1, 4, [])
