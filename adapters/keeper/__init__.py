# SPDX-License-Identifier: Apache-2.0
"""luod-keeper: a tiny process that holds session fds so that luod may die."""
