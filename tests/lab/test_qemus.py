# SPDX-License-Identifier: Apache-2.0
"""More than one QEMU: which there are, which is older, and a newer one that runs although nothing of it is installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from luod.lab import qemus
from luod.lab.errors import LabUnavailable


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="ascii")
    path.chmod(0o755)
    return path


def test_versions_are_sorted_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    installed = program(tmp_path / "bin" / qemus.QEMU, "echo QEMU emulator version 10.0.2")
    monkeypatch.setenv("PATH", str(installed.parent))
    for version in ("11.1.3", "9.2.0", "10.0.2"):
        program(qemus.qemu_directory() / version / qemus.QEMU, f"echo QEMU emulator version {version}")
    found = qemus.available_qemus()
    assert [one.version for one in found] == ["9.2.0", "10.0.2", "11.1.3"]
    assert found[1].binary == installed, "the installed one of two equal versions"


@pytest.mark.parametrize(
    "text", ["exit 1", "echo a picture viewer, version unknown", "echo no libc >&2; exit 127"]
)
def test_what_is_no_qemu_is_said(text: str, tmp_path: Path) -> None:
    with pytest.raises(LabUnavailable, match="version"):
        qemus.read_qemu(program(tmp_path / "qemu", text))
    with pytest.raises(LabUnavailable, match="does not run"):
        qemus.read_qemu(tmp_path / "none")


@pytest.mark.lab
@pytest.mark.timeout(600)
def test_a_newer_qemu_is_fetched_once_and_runs() -> None:
    newer = qemus.fetch_qemu()
    assert newer.numbers >= (11,)
    assert newer in qemus.available_qemus()
    stamp = newer.binary.stat().st_ino
    assert qemus.fetch_qemu().binary.stat().st_ino == stamp
    said = subprocess.run(
        [newer.binary, "-machine", "help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "pc-q35-10.0" in said.stdout
