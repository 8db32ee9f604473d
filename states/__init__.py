# SPDX-License-Identifier: Apache-2.0
"""What happened and what may follow: events, tables, guards and folds; no input or output."""
