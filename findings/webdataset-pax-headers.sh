#!/usr/bin/env bash
# webdataset 1.0.2: TarWriter gives every member a PAX header of 1,024 bytes, since it writes the time as a float.
#
# A sample of two short text members takes 4,096 bytes in place of 2,048. `TarWriter(..., mtime=0)`, an integer, writes
# none. A float passed as mtime, such as time.time(), brings the headers back.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 webdataset==1.0.2
cd "$work"
venv/bin/python - <<'PYTHON'
import io
import sys

import webdataset


def write(**options):
    """(size of a tar of 100 samples of two members in bytes, number of its PAX headers)."""
    stream = io.BytesIO()
    writer = webdataset.TarWriter(stream, **options)
    for number in range(100):
        writer.write({"__key__": f"{number:06d}", "cls": "1", "txt": "a caption"})
    writer.close()
    content, position, num_pax = stream.getvalue(), 0, 0
    while content[position : position + 512].strip(b"\0"):
        header = content[position : position + 512]
        num_pax += header[156:157] == b"x"
        position += 512 + (int(header[124:135], 8) + 511) // 512 * 512
    return len(content), num_pax


default, integer, real = write(), write(mtime=0), write(mtime=1_700_000_000.0)
print(f"webdataset {webdataset.__version__}: 100 samples of two members each")
for what, (size, num_pax) in {"default": default, "mtime=0": integer, "mtime=1.7e9": real}.items():
    print(f"  {what:12} {size:7,} bytes, {num_pax} PAX headers")
as_found = default[1] == real[1] == 200 and integer[1] == 0 and default[0] > 1.9 * integer[0]
print("as found" if as_found else "CHANGED: the default no longer costs a PAX header per member")
sys.exit(0 if as_found else 1)
PYTHON
