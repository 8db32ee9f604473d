# SPDX-License-Identifier: Apache-2.0
"""One QEMU process: its monitor, its memory, and how its guest is stopped in one kernel and goes on in the next."""
