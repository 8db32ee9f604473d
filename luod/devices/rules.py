# SPDX-License-Identifier: Apache-2.0
"""The order rules: what must be so before something is mapped, preserved, or jumped over. Pure: facts in, violations out.

The kernel would refuse most of them too, but late, by EINVAL and without a name, some of them only at the jump, when every guest stands
still (docs/vfio.md names the source of each).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from ..states.errors import LuodError

Kind = Literal["memfd", "iommufd", "vfio"]


class Violation(msgspec.Struct, frozen=True):
    """One rule that something breaks: the rule's name, what breaks it, and what to do."""

    rule: Literal[
        "own-page-table",
        "sealed-before-mapping",
        "memory-first",
        "iommufd-first",
        "one-session",
        "interrupts-off",
        "awake",
    ]
    subject: str
    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.message}"


class OrderViolated(LuodError):
    """Order rules are broken; the kernel was not asked. `violations` has all of them."""

    errno = "EINVAL"

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__(
            "; ".join(map(str, violations)), hint="; ".join(dict.fromkeys(one.hint for one in violations))
        )
        self.violations = tuple(violations)


def enforce(violations: Iterable[Violation]) -> None:
    """Raise `OrderViolated` when there are any."""
    found = list(violations)
    if found:
        raise OrderViolated(found)


def before_mapping(memory: str, *, sealed: bool) -> list[Violation]:
    """A memory must have its size sealed before devices reach it: afterwards its pages are pinned and its handler looks at seals only."""
    if sealed:
        return []
    return [
        Violation(
            "sealed-before-mapping",
            f"memory {memory}",
            "its size is not sealed, and it is about to be mapped for devices",
            "add F_SEAL_GROW, F_SEAL_SHRINK and F_SEAL_SEAL first (adapters.memfd.seal_for_preservation)",
        )
    ]


class Asked(msgspec.Struct, frozen=True):
    """One PRESERVE_FD that is about to be made: what, into which session, and the tokens that it rests on."""

    token: str
    kind: Kind
    session: str
    needs: tuple[str, ...] = ()


def before_preserving(asked: Sequence[Asked]) -> list[Violation]:
    """Memories before the iommufd that maps them, the iommufd before its devices, and all of a guest in one session.

    A handler looks for what its file rests on in the same session, among what is preserved already.
    """
    found: list[Violation] = []
    seen: dict[str, str] = {}
    sessions = list(dict.fromkeys(one.session for one in asked))
    for one in asked:
        if one.session != sessions[0]:
            found.append(
                Violation(
                    "one-session",
                    f"{one.kind} {one.token}",
                    f"it is to go into session {one.session}, the others of its guest into {sessions[0]}",
                    "preserve everything of a guest in one session",
                )
            )
        for need in one.needs:
            if need in seen:
                continue
            first: Literal["memory-first", "iommufd-first"] = (
                "iommufd-first" if one.kind == "vfio" else "memory-first"
            )
            found.append(
                Violation(
                    first,
                    f"{one.kind} {one.token}",
                    f"it rests on {need}, which is not preserved before it",
                    "preserve memfds first, then the iommufd, then the devices",
                )
            )
        seen[one.token] = one.session
    return found


def own_page_table(shared: Iterable[str]) -> list[Violation]:
    """Every device that is carried needs a page table that is its own: it is that which is marked, carried, and taken up again."""
    return [
        Violation(
            "own-page-table",
            f"iommufd {token}",
            "its devices share one page table",
            'make a page table for each (`own_tables=True`), or subscribe with devices="reattach"',
        )
        for token in shared
    ]


class Standing(msgspec.Struct, frozen=True):
    """A device as it stands at the freeze: the kinds of interrupts that are on, and its power state (0 is D0)."""

    device: str
    irqs_on: tuple[str, ...] = ()
    power_state: int = 0


def before_the_jump(devices: Iterable[Standing]) -> list[Violation]:
    """Every device must have its interrupts off and be in D0: otherwise its freeze fails, and the whole reboot with it."""
    found: list[Violation] = []
    for one in devices:
        if one.irqs_on:
            found.append(
                Violation(
                    "interrupts-off",
                    f"device {one.device}",
                    f"its {' and '.join(one.irqs_on)} interrupts are on",
                    "turn them off before READY (VFIO_DEVICE_SET_IRQS with count 0)",
                )
            )
        if one.power_state:
            found.append(
                Violation(
                    "awake",
                    f"device {one.device}",
                    f"it is in power state D{one.power_state}",
                    "bring it to D0 before READY",
                )
            )
    return found
