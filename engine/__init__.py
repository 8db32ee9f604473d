# SPDX-License-Identifier: Apache-2.0
"""Decide and drive: commands become events, effects are intended, made, probed and reconciled."""
