# SPDX-License-Identifier: Apache-2.0
"""VFIO: devices in the hands of a program, what a VMM asks of /dev/vfio."""
