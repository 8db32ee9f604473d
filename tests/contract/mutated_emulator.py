# SPDX-License-Identifier: Apache-2.0
"""An emulator with one thing wrong in it: `python mutated_emulator.py MODULE OLD NEW -- ARGUMENTS...`.

The source of `luod.adapters.emulator.MODULE` is loaded with the one occurrence of OLD replaced by NEW.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def install(module: str, old: str, new: str) -> None:
    """Put the changed module in the place of the real one."""
    package = importlib.import_module("luod.adapters.emulator")
    path = Path(str(package.__file__)).with_name(f"{module}.py")
    source = path.read_text("utf-8")
    if source.count(old) != 1:
        raise SystemExit(f"{module}: {source.count(old)} places say {old!r}")
    name = f"luod.adapters.emulator.{module}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    changed = importlib.util.module_from_spec(spec)
    sys.modules[name] = changed
    exec(compile(source.replace(old, new), str(path), "exec"), changed.__dict__)


if __name__ == "__main__":
    separator = sys.argv.index("--")
    install(*sys.argv[1:separator])
    from luod.adapters.emulator.__main__ import main

    raise SystemExit(main(sys.argv[separator + 1 :]))
