"""PyAV, an optional package, for the modules that read and write clips."""

from pomscale.base.errors import InputError

try:
    import av
    from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
except ImportError as error:
    raise InputError(f"clips need the package av: {error}. Run: pip install -e '.[video]'") from error

__all__ = ["Colorspace", "Interpolation", "VideoReformatter", "av"]
