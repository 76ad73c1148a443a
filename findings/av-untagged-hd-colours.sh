#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1.2): frames whose colour matrix is not stated become RGB by BT.601, whatever their size.
#
# Players commonly take such a video for BT.709 if it is HD. An untagged frame of 1280x720 that holds the red of BT.709,
# 254 0 0, becomes 232 0 1, as one of 640x480 does; tagged BT.709, it becomes 254 0 0. Without a tag only
# reformat(src_colorspace=...) does; dst_colorspace, the matrix of the result, changes nothing where the result is RGB.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q av==18.1.0
cd "$work"
venv/bin/python - <<'PYTHON'
import sys

import av
from av.video.reformatter import Colorspace


def rgb(size, tag=None, **options):
    """The colour that the red of BT.709 becomes."""
    frame = av.VideoFrame(*size, "yuv420p")
    for plane, value in zip(frame.planes, (63, 102, 240)):
        plane.update(bytes([value]) * plane.buffer_size)
    if tag is not None:
        frame.colorspace = tag
    return tuple(bytes(frame.reformat(format="rgb24", **options).planes[0])[:3])


hd, sd = (1280, 720), (640, 480)
colours = {
    "1280x720, no tag": rgb(hd),
    "640x480, no tag": rgb(sd),
    "1280x720, tag BT.601": rgb(hd, Colorspace.ITU601),
    "1280x720, tag BT.709": rgb(hd, Colorspace.ITU709),
    "1280x720, no tag, src_colorspace=BT.709": rgb(hd, src_colorspace=Colorspace.ITU709),
    "1280x720, no tag, dst_colorspace=BT.709": rgb(hd, dst_colorspace=Colorspace.ITU709),
}
print(f"PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}: Y'CbCr 63 102 240, which is RGB 254 0 0 by BT.709, as RGB")
for what, colour in colours.items():
    print(f"  {what:40} {' '.join(map(str, colour))}")
untagged, small, by_601, by_709, by_source, by_target = colours.values()
as_found = untagged == small == by_601 == by_target and by_709 == by_source and untagged[0] < 240 < 250 < by_709[0]
print("as found" if as_found else "CHANGED: untagged HD frames are no longer read by BT.601 in this way")
sys.exit(0 if as_found else 1)
PYTHON
