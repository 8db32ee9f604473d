# SPDX-License-Identifier: Apache-2.0
"""Passthrough devices through a live update: for the authors of VMMs and other agents that hold VFIO devices.

A `Guest` says what is mapped where and which device is bound to what. From it follow the restore plans that are recorded at preserve
time (`plans`), the same plans that set the devices up in the first place. `Preservation` asks the kernel to carry them, or quiets them
where it cannot; `Restoration` executes the plans in the new kernel. `docs/vfio.md` is the guide.
"""
