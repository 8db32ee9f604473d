# SPDX-License-Identifier: Apache-2.0
"""The plans of devices that are carried: a page table of its own for each, marked before an update and taken up again after it."""

from __future__ import annotations

from emulated_vmm import guest_with

from luod.devices.guest import plans
from luod.devices.rules import own_page_table
from luod.engine.plan import steps_of

GUEST = guest_with("0000:00:04.0", "0000:00:05.0")


def names(devices: str, token: str, *, own_tables: bool = True) -> list[str]:
    guest = guest_with("0000:00:04.0", "0000:00:05.0", own_tables=own_tables)
    return [one.step for one in steps_of(plans(guest, devices)) if one.token == token]  # type: ignore[arg-type]


def test_the_old_page_table_is_taken_up_before_a_new_one_replaces_it() -> None:
    wanted = [
        "vfio.retrieve",
        "vfio.bind",
        "iommufd.hwpt_restore",
        "iommufd.hwpt_alloc",
        "vfio.attach",
        "iommufd.mark_preserve",
    ]
    for token in ("0x30", "0x31"):
        assert [step for step in names("preserve", token) if step in wanted] == wanted


def test_what_is_set_up_can_be_carried_by_the_next_update() -> None:
    assert "iommufd.mark_preserve" in names("reattach", "0x30")
    assert "iommufd.mark_preserve" not in names("reattach", "0x30", own_tables=False)
    assert "iommufd.hwpt_restore" not in names("reattach", "0x30")


def test_places_of_page_tables_do_not_meet() -> None:
    """Taken up and new ones share the ids of one iommufd."""
    steps = [one for one in steps_of(plans(GUEST, "preserve")) if "hwpt" in one.step]
    assert [(one.token, one.step, one.args["place"]) for one in steps] == [
        ("0x30", "iommufd.hwpt_restore", 0),
        ("0x30", "iommufd.hwpt_alloc", 1),
        ("0x31", "iommufd.hwpt_restore", 2),
        ("0x31", "iommufd.hwpt_alloc", 3),
    ]


def test_a_shared_page_table_is_named() -> None:
    (found,) = own_page_table(["0x20"])
    assert (found.rule, found.subject) == ("own-page-table", "iommufd 0x20")
    assert "own_tables" in found.hint
