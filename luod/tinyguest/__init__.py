# SPDX-License-Identifier: Apache-2.0
"""A guest of one KiB that counts, checks all of its memory, and says so on its serial port."""
