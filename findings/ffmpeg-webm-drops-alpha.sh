#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1.2): VP8 and VP9 with transparency lose it in decoding, without a warning.
#
# WebM keeps transparency as a second picture beside each packet. FFmpeg's own decoders, the default, do not read it and
# give opaque yuv420p; the decoders of libvpx, which are in the same build, give yuva420p. The tag alpha_mode=1 of the stream
# tells that there is transparency.
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

av.logging.set_level(av.logging.WARNING)


def write(codec):
    """A WebM file of 3 light grey frames whose opacity is 100 of 255."""
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as output:
        stream = output.add_stream(codec, rate=25, options={"auto-alt-ref": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuva420p"
        stream.bit_rate = 100_000
        for number in range(3):
            frame = av.VideoFrame(64, 64, "yuva420p")
            for plane, value in zip(frame.planes, (180, 128, 128, 100)):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file


def read(file, decoder=None):
    """(name of the decoder, its format, a pixel as RGBA, alpha_mode, number of warnings) of the first frame."""
    file.seek(0)
    with av.logging.Capture(local=False) as warnings, av.open(file) as source:
        stream = source.streams.video[0]
        context = av.CodecContext.create(decoder, "r") if decoder else stream.codec_context
        frame = next(frame for packet in source.demux(stream) for frame in context.decode(packet))
        pixel = tuple(bytes(frame.reformat(format="rgba").planes[0])[:4])
        return context.codec.name, frame.format.name, pixel, stream.metadata.get("alpha_mode"), len(warnings)


print(f"PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}: WebM of opacity 100, as RGBA")
as_found = True
for codec in ("libvpx", "libvpx-vp9"):
    file = write(codec)
    default, by_libvpx = read(file), read(file, codec)
    for name, kind, pixel, alpha_mode, num_warnings in (default, by_libvpx):
        print(f"  {name:11} {kind:9} {' '.join(map(str, pixel))} (alpha_mode={alpha_mode}, {num_warnings} warnings)")
    as_found &= default[0] != codec and default[1] == "yuv420p" and default[2][3] == 255 and default[3:] == ("1", 0)
    as_found &= by_libvpx[1] == "yuva420p" and abs(by_libvpx[2][3] - 100) <= 2
print("as found" if as_found else "CHANGED: the default decoders no longer drop transparency in this way")
sys.exit(0 if as_found else 1)
PYTHON
