"""Sources of raw items: folders, tars and tables of pictures, clips and captions."""

from __future__ import annotations

from pomscale.config.encode import (
    ImageFolderConfig,
    RawSourceConfig,
    TarSourceConfig,
    VideoFolderConfig,
)
from pomscale.sources.protocol import Source


def build_source(config: RawSourceConfig) -> Source:
    """Return the source that a recipe names. Nothing is read before `scan`."""
    # Imported here, so that each source asks only for the packages that it needs itself.
    if isinstance(config, ImageFolderConfig):
        from pomscale.sources.image_folder import ImageFolderSource  # noqa: PLC0415

        return ImageFolderSource(config)
    if isinstance(config, VideoFolderConfig):
        from pomscale.sources.video_folder import VideoFolderSource  # noqa: PLC0415

        return VideoFolderSource(config)
    if isinstance(config, TarSourceConfig):
        from pomscale.sources.tars import TarSource  # noqa: PLC0415

        return TarSource(config)
    from pomscale.sources.table import TableSource  # noqa: PLC0415

    return TableSource(config)
