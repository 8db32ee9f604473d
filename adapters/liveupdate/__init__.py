# SPDX-License-Identifier: Apache-2.0
"""The kernel's Live Update Orchestrator: its ABI, its two-function seam, and the port built on it."""
