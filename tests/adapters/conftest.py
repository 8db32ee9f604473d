# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the adapter tests: an emulator, its control desk, and the port on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from luod.adapters.emulator.control import Control
from luod.adapters.emulator.process import Emulator
from luod.adapters.kernel import open_kernel
from luod.adapters.liveupdate.device import LiveUpdate

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[Emulator]:
    with Emulator.start(tmp_path / "emulator") as made:
        yield made


@pytest.fixture
def control(emulator: Emulator) -> Iterator[Control]:
    """The harness: this process outlives every reboot."""
    with emulator.control(timeout=30) as made:
        made.spare(os.getpid())
        yield made


@pytest.fixture
def kernel(emulator: Emulator) -> LiveUpdate:
    return open_kernel("emulated", directory=emulator.directory)
