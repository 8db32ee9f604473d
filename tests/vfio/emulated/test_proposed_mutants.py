# SPDX-License-Identifier: Apache-2.0
"""The cases must notice wrong plug-ins: each mutant breaks one rule of the emulated kernel, and the case that is for it has to fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import test_emulated_iommufd
import test_emulated_vfio
import test_proposed_contract
from passthrough_host import started

from luod.adapters import proposed

MUTATED = Path(__file__).parents[2] / "contract" / "mutated_emulator.py"


class Mutant(NamedTuple):
    """One change in a module of the emulator, and the case that must fail for it."""

    name: str
    module: str
    old: str
    new: str
    case: str


NO_DOMAIN = """        if any(not hwpt.translates for hwpt in marked):
            raise Refused(errno.EINVAL)
"""
SEALS = """        if area.memory.seals & PRESERVATION_SEALS != PRESERVATION_SEALS:
            raise Refused(errno.EINVAL)
"""
NO_FILE = """        if area.memory is None:
            raise Refused(errno.EINVAL)
        if area"""
FROZEN_CASE = "test_a_frozen_device_is_dead_until_it_is_closed"
NOT_HERE = "            raise Refused(proposed.NOT_IN_SESSION_ERRNO)\n        taken.append((area, found))"
REGION = "    def _region(self, offset: int, length: int) -> tuple[int, int]:\n"
UNBOUND = "        if not self.bound:\n            raise Refused(errno.EINVAL)\n        run ="
SECOND = """        if self.function.opener is not None:
            raise Refused(errno.EINVAL)  # open through another file already
"""
MUTANTS = [
    Mutant("token used twice", "iommufd", "if any(other.token == token for other in self.hwpts()):", "if False:",
           "test_a_token_is_used_once"),
    Mutant("calls known without plug-ins", "iommufd", "        if speaks_proposed:\n", "        if True:\n",
           "test_a_kernel_without_the_series_does_not_know_the_call"),
    Mutant("mappings before domains", "passthrough", NO_DOMAIN, "", "test_a_page_table_without_a_domain"),
    Mutant("user memory carried", "passthrough", NO_FILE, "        if area.memory is None:\n            continue\n        if area",
           "test_memory_that_is_no_file"),
    Mutant("seals not looked at", "passthrough", SEALS, "", "test_memory_that_was_sealed_too_late"),
    Mutant("seals of now instead of then", "passthrough", "area.memory.seals & PRESERVATION_SEALS",
           "Memory(area.memory.fd, __import__('fcntl').fcntl(area.memory.fd, 1034)).seals & PRESERVATION_SEALS",
           "test_memory_that_was_sealed_too_late"),
    Mutant("memfd of no session", "passthrough", NOT_HERE,
           "            continue\n        taken.append((area, found))", "test_the_order_is_memory_iommufd_device"),
    Mutant("any iommufd will do", "passthrough", "and cdev.bound and opened(other) is cdev.iommufd", "",
           "test_a_device_of_another_iommufd"),
    Mutant("mark does not matter", "passthrough", "if cdev.hwpt.token is None or cdev.hwpt.token not in iommufd.page_tables:",
           "if cdev.hwpt.token is None and cdev.hwpt.users == set():", "test_an_unmarked_page_table"),
    Mutant("marked too late", "passthrough", "if cdev.hwpt.token is None or cdev.hwpt.token not in iommufd.page_tables:",
           "if cdev.hwpt.token is None:", "test_an_unmarked_page_table"),
    Mutant("virtual functions carried", "passthrough", " and not found.function.option.vf", "", "test_a_virtual_function"),
    Mutant("address space changes", "passthrough", "            one.hwpt.space.immutable = True\n", "",
           "test_a_preserved_address_space_is_immutable"),
    Mutant("address space never changes again", "passthrough", "            one.hwpt.space.immutable = one.hwpt.restored\n", "",
           "test_a_preserved_address_space_is_immutable"),
    Mutant("preserved device attached elsewhere", "vfio_cdev", "if self.preserved and hwpt is not self.hwpt:", "if False:",
           "test_a_preserved_address_space_is_immutable"),
    Mutant("preserved page table destroyed", "iommufd", "if found.users or found.preserved:", "if False:",
           "test_a_preserved_address_space_is_immutable"),
    Mutant("interrupts at the freeze", "passthrough", "cdev.function.irq_index is not None or ", "", "test_interrupts_that_are_on"),
    Mutant("sleep at the freeze", "passthrough", " or cdev.function.power_state != D0", "", "test_a_device_that_sleeps"),
    Mutant("unfreeze", "passthrough", "    can_unfreeze = False\n",
           "    def unfreeze(self, file, data, /):\n        _cdev(file).frozen = False\n", FROZEN_CASE),
    Mutant("bus mastering over the freeze", "passthrough", "        cdev.function.quiesce()\n", "", FROZEN_CASE),
    Mutant("a frozen device can be read", "vfio_cdev", REGION + "        self._alive()\n", REGION, FROZEN_CASE),
    Mutant("claimed device opened", "board", "        if slot.arrived is not None:\n            raise Refused(errno.EBUSY)\n", "",
           "test_a_claimed_device_cannot_be_opened_or_rebound"),
    Mutant("claimed device rebound", "board", "claimed = slot.arrived is not None and driver != VFIO_PCI", "claimed = False",
           "test_a_claimed_device_cannot_be_opened_or_rebound"),
    Mutant("page table not attached at boot", "board", "            slot.function.space = arrived.page_table.space\n", "",
           "test_a_claimed_device_cannot_be_opened_or_rebound"),
    Mutant("driver does not matter", "passthrough", " or slot.driver != VFIO_PCI", "", "test_a_device_that_the_host_has_not_bound"),
    Mutant("refusal is forgotten", "core", "            entry.error = refusal.code\n", "", "test_a_device_that_the_host_has_not_bound"),
    Mutant("bind to any", "vfio_cdev", "        if not self._may_bind(iommufd):\n            raise Refused(errno.EPERM)\n", "",
           "test_bind_to_its_own_iommufd_only"),
    Mutant("works without bind", "vfio_cdev", UNBOUND, "        run =",
           "test_nothing_works_before_the_bind"),
    Mutant("finish without retrieve of the iommufd", "passthrough",
           'return status == "retrieved" and payload.file is not None and payload.file.reclaimed()',
           "return payload.file is None or payload.file.reclaimed()", "test_finish_needs_the_iommufd"),
    Mutant("finish without reclaim", "iommufd", "one.reclaimed and not (one.hwpt is not None and one.hwpt.users)",
           "not (one.hwpt is not None and one.hwpt.users)", "test_a_new_page_table_may_come_first"),
    Mutant("finish while attached", "iommufd", "one.reclaimed and not (one.hwpt is not None and one.hwpt.users)", "one.reclaimed",
           "test_finish_waits_for_every_rule"),
    Mutant("reclaimed twice", "iommufd", "if one is None or one.reclaimed:", "if one is None:", "test_finish_waits_for_every_rule"),
    Mutant("reclaimed without its devices", "iommufd", "        if one.bdfs - bound.keys():\n            raise Refused(errno.ENODEV)\n", "",
           "test_finish_waits_for_every_rule"),
    Mutant("reclaim brings devices back", "iommufd", "if bound[bdf].space is one.space:", "if True:",
           "test_a_new_page_table_may_come_first"),
    Mutant("claim outlives finish", "passthrough",
           '        """End the claim: the device may be opened by its node again."""\n        self._board.unclaim(payload)\n',
           '        """End the claim: the device may be opened by its node again."""\n', "test_finish_waits_for_every_rule"),
    Mutant("old memory after the jump", "passthrough", "Memory(memfd.successor.fd, memfd.seals).share()",
           "Memory(__import__('os').memfd_create('x'), memfd.seals)", "test_memory_stays_the_same_across_the_jump"),
    Mutant("offset into the memory lost", "passthrough", "space.map(area.iova, area.length, area.flags, memory, area.start)",
           "space.map(area.iova, area.length, area.flags, memory, 0)", "test_a_mapping_keeps_its_place_in_the_memory"),
    Mutant("seals of carried mappings lost", "passthrough", "Memory(memfd.successor.fd, memfd.seals).share()",
           "Memory(memfd.successor.fd).share()",
           "test_a_restored_page_table_can_go_on"),
    Mutant("bind takes a second opener", "vfio_cdev", SECOND, "",
           "test_bind_in_its_order"),
    Mutant("EBADFD for EBADF", "vfio_cdev", "        if file is None:\n            raise Refused(errno.EBADF)\n        iommufd =",
           "        iommufd =",
           "test_bind_in_its_order"),
    Mutant("bus mastering does not matter", "pci_function", "if not self.command & BUS_MASTER:", "if False:",
           "test_dma_needs_bus_mastering_and_a_mapping"),
    Mutant("read-only mappings written", "address_space", "if piece.memory is None or not piece.flags & flag:", "if piece.memory is None:",
           "test_a_mapping_that_devices_may_only_read"),
    Mutant("the device survives its last close", "vfio_cdev", "            self.function.disable_all()\n", "",
           "test_the_last_close_disables_the_device"),
    Mutant("sizes after flags", "iommufd", "argument = call.take(_MINIMUM.get(call.request, struct.size), struct.size)",
           "argument = call.take(4, struct.size)", "test_sizes_come_first"),
]  # fmt: skip


def case_of(name: str) -> object:
    for module in (test_proposed_contract, test_emulated_vfio, test_emulated_iommufd):
        if hasattr(module, name):
            return getattr(module, name)
    raise LookupError(name)


def run(directory: Path, case: object, **options: object) -> None:
    """Run a case on a machine of its own, with what its arguments ask for."""
    wanted = case.__code__.co_varnames[: case.__code__.co_argcount]  # type: ignore[attr-defined]
    if "tmp_path" in wanted:
        if options:
            options["handlers"] = ()  # it is a machine without plug-ins that this case is about
        with started(directory, **options) as host:  # type: ignore[arg-type]
            guest = host.guest(mark=None)
            with test_proposed_contract.refused(25):
                host.raw(guest.iommufd.fd, proposed.HWPT_LIVEUPDATE_MARK_PRESERVE, bytearray(24))
        return
    with started(directory, **options) as host:  # type: ignore[arg-type]
        arguments = [host] + ([host.iommufd()] if "iommufd" in wanted else [])
        case(*arguments)  # type: ignore[operator]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_case_notices(tmp_path: Path, mutant: Mutant) -> None:
    command = (sys.executable, str(MUTATED), mutant.module, mutant.old, mutant.new, "--")
    case = case_of(mutant.case)
    with pytest.raises((Exception, pytest.fail.Exception)):
        run(tmp_path, case, command=command)


def test_the_mutated_modules_are_sound_when_nothing_is_changed(tmp_path: Path) -> None:
    """What makes a mutant fail is its change, not that it is one."""
    command = (
        sys.executable,
        str(MUTATED),
        "passthrough",
        "can_unfreeze = False",
        "can_unfreeze = not True",
        "--",
    )
    run(tmp_path, case_of("test_finish_waits_for_every_rule"), command=command)
