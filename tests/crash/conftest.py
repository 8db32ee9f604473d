# SPDX-License-Identifier: Apache-2.0
"""The shim, the place to crash in, and the modules beside this file."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler: gcc builds the shim that crashes processes")
    from crash_harness import build_shim

    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def arena() -> Iterator[Path]:
    """Give a directory in memory: what is synced is decided by the harness, not by a disk."""
    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="luod-crash-", dir=memory if memory.is_dir() else None))
    yield directory
    shutil.rmtree(directory)
