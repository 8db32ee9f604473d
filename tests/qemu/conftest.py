# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the QEMU tests: a rig that starts QEMUs on one guest's memory and reads what the guest says."""

from __future__ import annotations

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
