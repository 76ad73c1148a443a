"""Report of one or several runs: one picture and one self-contained HTML page."""
