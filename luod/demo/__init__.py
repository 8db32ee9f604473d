# SPDX-License-Identifier: Apache-2.0
"""A whole live update to look at, with real processes, real memory and a journal; and luod killed at every point of it."""
