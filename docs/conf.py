# SPDX-License-Identifier: Apache-2.0
"""How the documentation is built: Markdown by MyST, warnings are errors, nothing is fetched."""

from __future__ import annotations

import tomllib
from pathlib import Path

_settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())

project = "luod"
author = "the luod authors"
release = version = _settings["project"]["version"]
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "examples"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
# Diagrams in mermaid are shown as their text, which is written to be read.
suppress_warnings = ["misc.highlighting_failure"]
highlight_language = "none"
nitpicky = True
html_theme = "alabaster"
html_theme_options = {"page_width": "68em", "body_max_width": "none", "show_powered_by": False}
html_show_copyright = False
