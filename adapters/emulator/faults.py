# SPDX-License-Identifier: Apache-2.0
"""Faults on order: errnos at named points of the kernel, and calls that are held until they are released.

Points that take an errno:
  open deserialize create retrieve_session preserve freeze retrieve can_finish load reboot sync
  device  an ioctl on a device file (`op`), before it is executed
Points that hold:
  call    before the ioctl `op`, or a SYNC, is executed
  reply   after it was executed and before its caller hears of it
  jump    between freeze and jump, while every call blocks
"""

from __future__ import annotations

from dataclasses import dataclass

ERRNO_POINTS = frozenset(
    {
        "open",
        "deserialize",
        "create",
        "retrieve_session",
        "preserve",
        "freeze",
        "retrieve",
        "can_finish",
        "load",
        "reboot",
        "sync",
        "device",
    }
)
HOLD_POINTS = frozenset({"call", "reply", "jump"})


@dataclass
class Fault:
    """One order: at `at`, for calls that match, after `skip` matches, `times` times (-1: for ever)."""

    number: int
    at: str
    errno: int = 0
    op: str | None = None
    session: bytes | None = None
    token: int | None = None
    skip: int = 0
    times: int = 1
    hits: int = 0
    released: bool = False

    def takes(self, at: str, op: str | None, session: bytes | None, token: int | None) -> bool:
        """Whether this order is for that call; counts it."""
        if at != self.at or (self.op is not None and op != self.op):
            return False
        if self.session is not None and session != self.session:
            return False
        if self.token is not None and token != self.token:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.released or self.times == 0:
            return False
        if self.times > 0:
            self.times -= 1
        self.hits += 1
        return True


class Faults:
    """The orders of one emulator, oldest first."""

    def __init__(self) -> None:
        self.orders: dict[int, Fault] = {}
        self._next = 1

    def add(
        self,
        at: str,
        *,
        errno: int = 0,
        op: str | None = None,
        session: bytes | None = None,
        token: int | None = None,
        skip: int = 0,
        times: int = 1,
    ) -> Fault:
        """Take an order. ValueError when the point does not exist, or wants an errno and has none."""
        if at not in ERRNO_POINTS | HOLD_POINTS:
            raise ValueError(f"no such point: {at!r}")
        if (at in ERRNO_POINTS) != (errno > 0):
            raise ValueError(
                f"point {at!r} " + ("wants an errno" if at in ERRNO_POINTS else "takes no errno")
            )
        fault = Fault(self._next, at, errno, op, session, token, skip, times)
        self.orders[fault.number] = fault
        self._next += 1
        return fault

    def clear(self) -> None:
        """Drop every order."""
        self.orders.clear()

    def errno(self, at: str, *, session: bytes | None = None, token: int | None = None) -> int:
        """Return the errno ordered for this point, or 0."""
        fault = self.match(at, session=session, token=token)
        return fault.errno if fault else 0

    def match(
        self, at: str, *, op: str | None = None, session: bytes | None = None, token: int | None = None
    ) -> Fault | None:
        """Return the order that this call falls under, or None."""
        for fault in self.orders.values():
            if fault.takes(at, op, session, token):
                return fault
        return None
