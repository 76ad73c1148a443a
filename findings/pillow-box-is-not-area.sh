#!/usr/bin/env bash
# Pillow 13.0.0: Resampling.BOX takes whole pixels whose centres fall inside the box; it does not weigh them by area.
#
# At a factor that is no whole number this is no average over areas, as FFmpeg's AREA is, which shares a pixel between two:
# 48 pixels, every third of them white, become stripes of 128 and 0 with BOX, and an even grey of 85 with FFmpeg and by the
# weights of area. Pillow's page says it in half a sentence: each source pixel contributes to one target pixel.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 pillow==13.0.0 av==18.1.0
cd "$work"
venv/bin/python - <<'PYTHON'
import sys

import av
import numpy as np
import PIL
from PIL import Image

stripes = np.repeat(np.where(np.arange(48) % 3 == 1, 255, 0).astype(np.uint8)[None], 8, axis=0)
edges = np.arange(33) * 1.5
integral = np.interp(edges, np.arange(49), np.concatenate([[0], np.cumsum(stripes[0], dtype=float)]))
exact = np.diff(integral) / 1.5
box = np.asarray(Image.fromarray(stripes).resize((32, 8), Image.Resampling.BOX))[0]
frame = av.VideoFrame.from_ndarray(stripes, format="gray")
area = frame.reformat(width=32, height=8, interpolation="AREA").to_ndarray()[0]
print(f"Pillow {PIL.__version__}, PyAV {av.__version__}: a row of 48 pixels, every third white, as 32 pixels")
for what, row in {"weighed by area": exact, "FFmpeg's AREA": area, "Pillow's BOX": box}.items():
    print(f"  {what:16} {' '.join(f'{value:.0f}' for value in row[:8])} ...")
as_found = abs(area - exact).max() <= 1 and set(box.tolist()) == {0, 128}
print("as found" if as_found else "CHANGED: BOX and AREA no longer differ in this way")
sys.exit(0 if as_found else 1)
PYTHON
