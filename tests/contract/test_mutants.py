# SPDX-License-Identifier: Apache-2.0
"""The suite must notice a wrong kernel: each mutant breaks the emulator in one place, and the case that is for it has to fail."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import test_boot_cases
from contract_world import World
from test_kexec_cases import run_stages

from luod.adapters.emulator.images import stub_image
from luod.adapters.emulator.process import Emulator

HERE = Path(__file__).parent


class Mutant(NamedTuple):
    """One change of the emulator, and the case that must fail for it (a function of test_boot_cases, or a kexec case)."""

    name: str
    module: str
    old: str
    new: str
    case: str
    stages: int = 0


TOKEN_CHECK = """        if token in session.out:
            raise Refused(errno.EEXIST)
"""
FD_CHECK = """        if file is None:
            raise Refused(errno.EBADF)
"""
ROOM_CHECK = """        if len(session.out) >= MAX_FILES:
            raise Refused(errno.ENOSPC)
"""
BUSY_CHECK = """        if identity in self._objects:
            raise Refused(errno.EBUSY)
"""

MUTANTS = [
    Mutant("fd before token", "core", TOKEN_CHECK + ROOM_CHECK + FD_CHECK, FD_CHECK + ROOM_CHECK + TOKEN_CHECK,
           "test_x07_duplicate_token"),
    Mutant("object preserved twice", "core", BUSY_CHECK, "", "test_k09_prevent_double_preservation"),
    Mutant("identity is the open file", "memfd_files", "return (facts.st_dev, facts.st_ino)", "return id(file)",
           "test_x09_same_memfd_by_second_open"),
    Mutant("EINVAL for ENOTTY", "core", "if request not in _SESSION_SIZES:\n            raise Refused(errno.ENOTTY)",
           "if request not in _SESSION_SIZES:\n            raise Refused(errno.EINVAL)", "test_x01_wrong_numbers"),
    Mutant("tail not looked at", "core", "if any(buf[known:size]):", "if False:", "test_x03_larger_struct"),
    Mutant("size not looked at", "core", "if size < known:", "if False:", "test_x02_size_too_small"),
    Mutant("reserved not looked at", "core", "if any(arg[4:8]):", "if False:", "test_x04_get_name_reserved"),
    Mutant("FINISH on outgoing", "core", "wants_incoming = request in (abi.RETRIEVE_FD, abi.FINISH)",
           "wants_incoming = request == abi.RETRIEVE_FD", "test_x05_retrieve_and_finish_on_outgoing"),
    Mutant("close does not destroy", "core", "            self._unpreserve_all(session)\n            del self.outgoing[session.name]\n",
           "", "test_x10_close_frees_name_and_object"),
    Mutant("close keeps the object", "core", "            self._unpreserve_all(session)\n", "",
           "test_x10_close_frees_name_and_object"),
    Mutant("name without NUL", "core", "if not name or not terminator:", "if not name:",
           "test_k10_create_session_no_null_termination"),
    Mutant("device opened twice", "core", "if self.device_open:", "if False:", "test_k02_exclusive_open"),
    Mutant("EIO once only", "core", "            self._deserialize_error = self._deserialize()\n        if self._deserialize_error:\n",
           "            self._deserialize_error = 0\n            if self._deserialize():\n                raise Refused(errno.EIO)\n"
           "        if False:\n", "test_x28_eio_is_for_ever"),
    Mutant("linked file accepted", "memfd_files", "and facts.st_nlink == 0", "", "test_x24_tmpfs_files"),
    Mutant("hugetlb accepted", "memfd_files", "and filesystem_magic(file.fd) == TMPFS_MAGIC", "", "test_x23_hugetlb_memfd"),
    Mutant("holes stay", "memfd_files", "            self._fill(fd, facts.st_size)\n", "            pass\n",
           "test_x22_preserve_fills_holes"),
    Mutant("O_PATH accepted", "device_calls", "fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH", "False", "test_x08_closed_and_path_fds"),
    Mutant("the session dies with the device", "core", "        self.device_open = False\n\n    def _deserialize",
           "        self.device_open = False\n        self.outgoing.clear()\n\n    def _deserialize",
           "test_x10_closing_the_device_changes_nothing"),
    Mutant("second RETRIEVE_SESSION", "core", "        session.retrieved = True\n        return session\n", "        return session\n",
           "x14", 2),
    Mutant("second retrieve makes a new file", "server", "-1 if file is None else file.fileno()",
           '-1 if file is None else os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR)', "x15", 2),
    Mutant("RETRIEVE_FD after FINISH", "core", "            entry = session.arrived.pop(token)\n",
           "            entry = session.arrived[token]\n", "x16", 2),
    Mutant("close without FINISH goes back", "core", "        try:\n            self._finish(session)\n",
           "        try:\n            session.retrieved = False\n            return\n", "x17_close", 2),
    Mutant("PRESERVE on incoming", "core", "or (wants_outgoing and session.retrieved)", "", "x06", 2),
    Mutant("names shared by both directions", "core", "        if name in self.outgoing:\n",
           "        if name in self.outgoing or name in self.incoming:\n", "x18", 2),
    Mutant("retrieved object is free", "core", "            self._objects.add(entry.handler.get_id(entry.file))\n", "", "x19", 2),
    Mutant("offset not kept", "memfd_files", "os.lseek(payload.content.fd, payload.offset, os.SEEK_SET)", "pass", "x21", 2),
    Mutant("offset not taken at freeze", "memfd_files", "data.offset = os.lseek(fd, 0, os.SEEK_CUR)", "data.offset = 2",
           "x21", 2),
    Mutant("seals lost", "memfd_files", "            if payload.seals:\n", "            if False:\n", "x21", 2),
    Mutant("seals taken too late", "memfd_files", "CarriedMemfd(Descriptor(fresh), data.size, data.seals, data.offset)",
           "CarriedMemfd(Descriptor(fresh), data.size, fcntl.fcntl(source, F_GET_SEALS), data.offset)", "x21", 2),
    Mutant("short copy", "memfd_files", "min(data.size, os.fstat(source).st_size))", "4096)", "x22_odd", 2),
    Mutant("empty sessions dropped", "core", "for session in self.outgoing.values()\n        ]",
           "for session in self.outgoing.values() if session.out\n        ]", "k21", 2),
    Mutant("incoming sessions forwarded", "core", "        self.power_off()\n        return records",
           "        records += [SessionRecord(s.name, ()) for s in self.incoming.values()]\n"
           "        self.power_off()\n        return records",
           "x20", 3),
    Mutant("close does not shrink the blocks", "core", "        if len(self.outgoing) <= (self._blocks - 1) * SESSIONS_PER_BLOCK:\n",
           "        if False:\n", "x29", 2),
]  # fmt: skip

BOOT_MUTANTS = [mutant for mutant in MUTANTS if mutant.case.startswith("test_")]
KEXEC_MUTANTS = [mutant for mutant in MUTANTS if mutant.stages]


def _mutated(directory: Path, mutant: Mutant) -> Emulator:
    command = (sys.executable, str(HERE / "mutated_emulator.py"), mutant.module, mutant.old, mutant.new, "--")
    return Emulator.start(directory, command=command)


@pytest.mark.parametrize("mutant", BOOT_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_case_within_a_boot_notices(tmp_path: Path, mutant: Mutant) -> None:
    case = getattr(test_boot_cases, mutant.case)
    with Emulator.start(tmp_path) as emulator:  # the case itself is sound
        _run(emulator, case)
    with _mutated(tmp_path, mutant) as emulator:
        assert _fails(emulator, case), "no one noticed"


def _fails(emulator: Emulator, case: object) -> bool:
    before = set(os.listdir("/proc/self/fd"))
    try:
        _run(emulator, case)
    except (Exception, pytest.fail.Exception):
        return True
    finally:
        for name in (
            set(os.listdir("/proc/self/fd")) - before
        ):  # a session that should not have been made has no owner
            with contextlib.suppress(OSError):
                os.close(int(name))
    return False


def _run(emulator: Emulator, case: object) -> None:
    with emulator.control() as control:
        control.spare(os.getpid())
    world = World("emulated", emulator.directory)
    try:
        case(world)  # type: ignore[operator]
    finally:
        world.end()


@pytest.mark.parametrize("mutant", KEXEC_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_case_across_kexecs_notices(tmp_path: Path, mutant: Mutant) -> None:
    with _mutated(tmp_path, mutant) as emulator:
        lines, jumped = _stages(emulator, tmp_path, mutant)
    assert not jumped or any(line.split()[1] == "FAIL" for line in lines), lines


def _stages(emulator: Emulator, directory: Path, mutant: Mutant) -> tuple[list[str], bool]:
    try:
        return run_stages(emulator, stub_image(directory / "image"), mutant.stages, mutant.case)
    except OSError as error:
        return [f"- FAIL {error}"], False


def test_every_mutant_is_run() -> None:
    assert len(BOOT_MUTANTS) + len(KEXEC_MUTANTS) == len(MUTANTS)
