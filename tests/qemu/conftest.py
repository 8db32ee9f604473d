# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the QEMU tests: a rig that starts QEMUs on one guest's memory and reads what the guest says."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from qemu_rig import QEMU, Rig
from wrapper_rig import Host


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """Give a path for a Unix socket: pytest's own may be too long for one."""
    with tempfile.TemporaryDirectory(prefix="luod-q-") as place:
        yield Path(place) / "qmp.sock"


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Make rigs, each a guest of its own: `make_rig(mib=16, ...)`. The test is skipped where there is no QEMU."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"needs {QEMU}")
    with ExitStack() as stack:

        def make(**options: Any) -> Rig:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="luod-q-")))
            return stack.enter_context(Rig(place, **options))

        yield make


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


@pytest.fixture
def slow_rig(make_rig: Callable[..., Rig], tmp_path: Path) -> Rig:
    """A guest with memory that must be copied into the state, 16 MiB of it, at a pace that takes more than a minute."""
    (tmp_path / "random").write_bytes(os.urandom(16 << 20))
    backend = f"memory-backend-file,id=extra,size=16M,mem-path={tmp_path}/random,share=off"
    rig = make_rig(devices=("-object", backend, "-device", "ivshmem-plain,memdev=extra,master=on"))
    rig.start()
    rig.speak(2)
    rig.guest.ask("migrate-set-parameters", max_bandwidth=200_000)
    return rig


@pytest.fixture
def host(disk_path: Path) -> Iterator[Host]:
    """A host in miniature, without guests yet."""
    with Host(disk_path / "state") as host:
        yield host
