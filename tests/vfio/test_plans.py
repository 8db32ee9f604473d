# SPDX-License-Identifier: Apache-2.0
"""The plans that follow from what a guest has: executable, in the order of the rules, and open about what is not carried."""

from __future__ import annotations

import json

import pytest

from luod.adapters.vfio import abi
from luod.devices.guest import (
    Device,
    Guest,
    Irqs,
    Mapping,
    Memory,
    Space,
    as_fields,
    from_fields,
    plans,
    quieting,
)
from luod.devices.host import Host
from luod.devices.steps import effects
from luod.engine.plan import check, steps_of
from luod.states.events import Resource

GUEST = Guest(
    (Memory("0x10", 1 << 20, "ram0"), Memory("0x11", 1 << 20)),
    (Space("0x20", (Mapping("0x10", 0, 1 << 20), Mapping("0x11", 1 << 32, 1 << 20, writable=False))),),
    (
        Device("0x30", "0000:00:04.0", "0x20", (Irqs(abi.MSIX, 3), Irqs(abi.INTX))),
        Device("0x31", "0000:00:05.0", "0x20", bus_master=False, take=True),
    ),
)


def kinds() -> set[str]:
    unused: object = None
    return set(effects(Host(unused, unused, unused)))  # type: ignore[arg-type]


def names(resources: list[Resource], token: str) -> list[str]:
    return [step.step for step in steps_of(resources) if step.token == token]


@pytest.mark.parametrize("devices", ["preserve", "reattach"])
def test_a_plan_has_effects_for_every_step_and_only_refers_back(devices) -> None:
    check(plans(GUEST, devices), kinds())
    check(quieting(GUEST), kinds())


def test_what_is_not_carried_says_so_and_begins_anew() -> None:
    reattached, preserved = plans(GUEST, "reattach"), plans(GUEST, "preserve")
    assert [one.kind for one in reattached] == ["memfd"] * 2 + ["iommufd-reopened"] + ["vfio-reattached"] * 2
    assert [one.kind for one in preserved] == ["memfd"] * 2 + ["iommufd"] + ["vfio"] * 2
    assert names(reattached, "0x20")[0] == "iommufd.open"
    assert names(preserved, "0x20")[0] == "iommufd.retrieve"
    assert names(reattached, "0x30")[0] == "vfio.open"
    assert names(preserved, "0x30")[0] == "vfio.retrieve"


def test_everything_that_was_on_comes_back_in_order() -> None:
    resources = plans(GUEST, "reattach")
    assert names(resources, "0x20") == [
        "iommufd.open", "iommufd.ioas_alloc", "iommufd.map_file#0x0", "iommufd.map_file#0x100000000",
        "iommufd.change_process",
    ]  # fmt: skip
    assert names(resources, "0x30") == [
        "vfio.open", "vfio.bind", "vfio.attach", "vfio.irqs#MSI-X", "vfio.irqs#INTx", "vfio.bus_master",
        "vfio.trigger#MSI-X", "vfio.trigger#INTx",
    ]  # fmt: skip
    assert names(resources, "0x31") == ["pci.take", "vfio.open", "vfio.bind", "vfio.attach"]
    places = [step.args["place"] for step in steps_of(resources) if step.kind == "vfio.bind"]
    assert places == [0, 1]


def test_an_inventory_survives_the_wire() -> None:
    resources = plans(GUEST, "reattach")
    assert from_fields(json.loads(json.dumps(as_fields(resources)))) == resources
