# SPDX-License-Identifier: Apache-2.0
"""Commands out of their order are refused and change nothing."""

from __future__ import annotations

import pytest
from luod_world import Puppet, World

from luod.client import ClientError


def test_during_and_after_an_update_that_is_undone(world: World) -> None:
    """READY twice, READY after an abort, and CLAIM before the reboot change nothing."""
    with world.client() as admin, Puppet(world) as one, Puppet(world) as two:
        one.call("SUBSCRIBE", id="order1")
        two.call("SUBSCRIBE", id="order2")
        update = world.kexec(admin)
        one.event("START_PRESERVATION")
        two.event("START_PRESERVATION")
        one.preserve(0x1, "x")
        one.call("READY", id="order1")
        before = admin.status()["journal"]["rows"]
        for cmd in ("READY", "PRESERVED", "CLAIM"):
            with pytest.raises(ClientError) as caught:
                one.call(cmd, id="order1")
            assert caught.value.code == "OUT_OF_ORDER"
        with pytest.raises(ClientError) as caught:
            one.call("PRESERVED", id="order1", resources=[{"token": "0x1"}, {"token": "0X01"}])
        assert caught.value.code in ("OUT_OF_ORDER", "BAD_FIELD")
        with pytest.raises(ClientError) as caught:
            admin.kexec()
        assert caught.value.code == "UPDATE_RUNNING"
        with pytest.raises(ClientError) as caught:
            two.call("PRESERVED", id="order2", resources=[{"token": "0x1"}, {"token": "0X01"}])
        assert caught.value.code == "BAD_FIELD"
        assert admin.status()["journal"]["rows"] == before
        assert admin.session("order1")["session"]["state"] == "ready"
        admin.abort()
        for puppet, name in ((one, "order1"), (two, "order2")):
            puppet.event("ABORT")
            for cmd in ("READY", "PRESERVED"):
                with pytest.raises(ClientError):
                    puppet.call(cmd, id=name)
            puppet.drop()
            puppet.call("ABORTED", id=name)
        world.wait_record("update.aborted", update)
        for name in ("order1.1", "order2.1"):
            assert admin.session(name)["session"]["state"] == "aborted"
            assert admin.session(name)["session"]["anomalies"] == []
        for name in ("order1.2", "order2.2"):
            world.wait_record("session.bound", name)
    for name in ("order1.2", "order2.2"):
        world.wait_record("session.aborted", name)
