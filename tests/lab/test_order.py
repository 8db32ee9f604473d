# SPDX-License-Identifier: Apache-2.0
"""The operator of the lab: it follows the update that it has ordered, and ends when there will be no jump."""

from __future__ import annotations

import errno

import pytest

from luod.demo.host import Host
from luod.demo.outcome import Setting
from luod.lab import order

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path / "run", Setting(sessions=1, size=8192))
    try:
        host.start_emulator()
        host.start_boot()
        host.start_clients()
        for child in host.clients():
            assert b"subscribed" in child.line(60)
        yield host
    finally:
        host.stop()


def test_refused_update_ends_the_operator_with_the_reason(host, capfd) -> None:
    host.control.inject("freeze", errno=errno.EBUSY)
    assert order.main(["--run", str(host.run_dir), "--kernel", str(host.image)]) == 1
    out, err = capfd.readouterr()
    assert "update/1 was aborted: " in err
    assert "EBUSY" in err
    assert '"type": "update.armed.v1"' in out


def test_what_luod_refuses_ends_the_operator_with_its_exit_code(host, capfd) -> None:
    missing = str(host.image) + ".gone"
    assert order.main(["--run", str(host.run_dir), "--kernel", missing]) not in (0, 2)
    assert missing in capfd.readouterr().err
