#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1.2): frames of an AVI with B-frames come in the order of showing, with pts that go back.
#
# AVI keeps no times, only packets in the order of decoding. Their count becomes the pts, which belongs to another frame
# wherever H.264 has reordered them: 1 3 4 2 6 7 5 in place of 1 2 3 4 5 6 7. Such an AVI is written without an error.
# MP4 and Matroska keep both times, and without B-frames (bf=0) an AVI's times are in order.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q av==18.1.0
cd "$work"
venv/bin/python - <<'PYTHON'
import io
import sys

import av


def decoded(container, num_b_frames):
    """(brightness, pts as a number of frames) of 12 frames that become brighter, after encoding with libx264."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream("libx264", rate=25, options={"bf": str(num_b_frames), "b-adapt": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(12):
            frame = av.VideoFrame(64, 64, "yuv420p")
            for plane, value in zip(frame.planes, (20 + 15 * number, 128, 128)):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    file.seek(0)
    with av.open(file) as source:
        frames = [(bytes(frame.planes[0])[0], frame.pts * frame.time_base * 25) for frame in source.decode(video=0)]
    return [brightness for brightness, _ in frames], [round(float(pts), 1) for _, pts in frames]


found = {
    "AVI, bf=2": decoded("avi", 2),
    "AVI, bf=0": decoded("avi", 0),
    "MP4, bf=2": decoded("mp4", 2),
    "Matroska, bf=2": decoded("matroska", 2),
}
print(f"PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}: 12 frames of rising brightness, H.264 by libx264")
for what, (brightness, times) in found.items():
    print(f"  {what:14} brightness {' '.join(map(str, brightness))}")
    print(f"  {'':14} pts        {' '.join(f'{time:g}' for time in times)}")
in_order = all(len(b) == 12 and sorted(b) == b for b, _ in found.values())
times_rise = [sorted(times) == times for _, times in found.values()]
as_found = in_order and times_rise == [False, True, True, True]
print("as found" if as_found else "CHANGED: the times of AVI's frames no longer go back in this way")
sys.exit(0 if as_found else 1)
PYTHON
