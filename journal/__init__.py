# SPDX-License-Identifier: Apache-2.0
"""The durable record: what happened, in order, chained, in SQLite, with a second copy in the black box.

`writer.Journal` writes, `replay` and `verify` read copies, `ring` is the black box, `export` the text form.
"""

from __future__ import annotations

if __package__ != "luod.journal":  # a second copy of every class, which no `except` and no type would match
    raise ImportError("import luod.journal, not journal")
