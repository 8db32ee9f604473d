# SPDX-License-Identifier: Apache-2.0
"""An emulated machine with passthrough devices and the proposed handlers, and this process as one that outlives its reboots."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from passthrough_host import Host, started


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with started(tmp_path) as made:
        yield made
