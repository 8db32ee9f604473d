# SPDX-License-Identifier: Apache-2.0
"""What the lab can fail with."""

from __future__ import annotations

from ..states.errors import LuodError


class LabError(LuodError):
    """The lab cannot do what was asked: something is missing, or a run went wrong."""


class LabUnavailable(LabError):
    """QEMU, a kernel image or a tool is missing on this machine: nothing was started."""

    exit_code = 3


class NoSuchKernel(LabUnavailable):
    """No bootable image of the wanted version in the directories that are searched."""


class BadImage(LabError):
    """A file that was named as a kernel image is not a bootable x86 Linux image."""

    exit_code = 2


class BuildFailed(LabError):
    """A stage of a kernel build ended with an error; its log says why."""


class LabRunFailed(LabError):
    """A lab run did not do what its script says; the message shows the place and the last console lines."""
