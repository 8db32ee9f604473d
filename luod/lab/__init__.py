# SPDX-License-Identifier: Apache-2.0
"""The lab: real Linux kernels with the Live Update Orchestrator, booted in QEMU.

`images` finds kernels, `build` makes them from Debian's source package, `machine` boots them and runs a script of steps that
`guest`, the init inside, carries out, and `commands` is the `luoctl lab` group.
"""
