# SPDX-License-Identifier: Apache-2.0
"""From one kernel to the next: what of the handed-over state a booting kernel takes up, loses, or dies of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .core import KernelModel, SessionRecord, discard
from .faults import Faults
from .handlers import HandlerRegistry
from .images import KernelImage


class KernelPanic(Exception):
    """The new kernel stops at early boot, as the real one does rather than leak private memory."""


@dataclass(frozen=True)
class Handover:
    """What the old kernel left in memory: the KHO string, the LUO string (None: LUO was off), and the sessions."""

    kho: str
    luo: str | None
    sessions: tuple[SessionRecord, ...] = ()
    empty_block: bool = False


@dataclass(frozen=True)
class Booted:
    """A running kernel: `model` is None where it offers no live update. `notes` is what its log says about the handover."""

    image: KernelImage
    cmdline: str
    model: KernelModel | None
    notes: tuple[str, ...]


def boot(
    image: KernelImage, cmdline: str, registry: HandlerRegistry, handover: Handover | None, faults: Faults
) -> Booted:
    """Boot `image`. `handover` is None after a cold boot, or after a kexec that carried none. KernelPanic as the kernel panics."""
    handlers = registry.build(image.handlers)
    notes: list[str] = []
    taken: Sequence[SessionRecord] = ()
    if handover is not None:
        lost = _reason_lost(image, cmdline, handover)
        if lost:
            notes.append(lost)
            discard(handover.sessions, handlers)
        elif handover.luo is not None:
            try:
                _check_luo(image, handover)
            except KernelPanic:
                discard(handover.sessions, handlers)
                raise
            if image.live_update_enabled(cmdline):
                notes.append("retrieved live update data")
                taken = handover.sessions
            else:
                notes.append("live update is off: the preserved memory stays reserved and cannot be reached")
                discard(handover.sessions, handlers)
    model = KernelModel(handlers, taken, faults) if image.live_update_enabled(cmdline) else None
    return Booted(image, cmdline, model, tuple(notes))


def _reason_lost(image: KernelImage, cmdline: str, handover: Handover) -> str:
    if not image.config_kho:
        return "passed handover data is ignored: CONFIG_KEXEC_HANDOVER is not set"
    if image.kho != handover.kho:
        return f"handover data is {handover.kho!r}, this kernel knows {image.kho!r}: disabling revival"
    if not image.config_liveupdate:
        return "CONFIG_LIVEUPDATE is not set: the preserved memory stays reserved and cannot be reached"
    if not image.kho_enabled(cmdline):
        return "kexec handover is off: the preserved memory stays reserved and cannot be reached"
    return ""


def _check_luo(image: KernelImage, handover: Handover) -> None:
    if image.luo != handover.luo:
        raise KernelPanic(
            f"the incoming tree failed to initialize: it is {handover.luo!r}, this kernel knows {image.luo!r}"
        )
    if handover.empty_block:
        raise KernelPanic(
            "the incoming tree failed to initialize: a block of sessions has an entry count of 0"
        )
