# SPDX-License-Identifier: Apache-2.0
"""`luo-qemu`: put before a usual QEMU command line, it lets the guest live through updates of the host's kernel."""
