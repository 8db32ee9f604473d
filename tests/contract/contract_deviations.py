# SPDX-License-Identifier: Apache-2.0
"""Where the backends may differ, all of it. A case listed as `fails` must fail: one that begins to pass has to be taken out."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Deviation(NamedTuple):
    """What a backend does with a case, and why."""

    kind: Literal["fails", "skipped"]
    reason: str


DEVIATIONS: dict[tuple[str, str], Deviation] = {
    ("x13_size_is_frozen", "emulated"): Deviation(
        "fails", "nothing in user space can freeze the size of a memfd"
    ),
    ("x13_write_seal_is_busy", "emulated"): Deviation(
        "fails", "nothing in user space can pin the pages of a memfd"
    ),
    ("x27_link_text", "emulated"): Deviation("fails", "an emulated session fd is a socket"),
    ("x32_fd_is_no_file", "emulated"): Deviation(
        "fails", "an emulated session fd is a socket: it can be polled and written to"
    ),
    ("x28_eio_is_for_ever", "device"): Deviation(
        "skipped", "no way to make a real kernel fail to deserialize"
    ),
}


def deviation(case: str, backend: str) -> Deviation | None:
    """The deviation of this backend in this case, if there is one. Names may carry the `test_` of their function."""
    return DEVIATIONS.get((case.removeprefix("test_"), backend))
