# SPDX-License-Identifier: Apache-2.0
"""A kernel in user space: the contract of /dev/liveupdate and of kexec, kept by one process and its sockets."""
