"""The report of runs: one picture and one self-contained HTML page."""
