# SPDX-License-Identifier: Apache-2.0
"""LUOD: the daemon that owns live updates on one host."""
