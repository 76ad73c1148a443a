"""The site that `make docs` builds from these pages into build/site. Nothing in it is loaded from the network."""

from __future__ import annotations

project = "pomscale"
html_title = "pomscale"
html_theme = "furo"
html_copy_source = html_show_sourcelink = html_show_copyright = False
extensions = ["myst_parser"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
exclude_patterns: list[str] = []
