"""Sources of raw items: folders, tars, tables, and the captions of datasets that are already encoded."""

from __future__ import annotations

from data_pipelines.sources.protocol import Source
from pomscale.config.encode import (
    ImageFolderConfig,
    SourceConfig,
    TableSourceConfig,
    TarSourceConfig,
    VideoFolderConfig,
)


def build_source(config: SourceConfig) -> Source:
    """Return the source that a recipe names. Nothing is read before `scan`."""
    # Imported here, so that each source asks only for the packages that it needs itself.
    if isinstance(config, ImageFolderConfig):
        from data_pipelines.sources.image_folder import ImageFolderSource  # noqa: PLC0415

        return ImageFolderSource(config)
    if isinstance(config, VideoFolderConfig):
        from data_pipelines.sources.video_folder import VideoFolderSource  # noqa: PLC0415

        return VideoFolderSource(config)
    if isinstance(config, TarSourceConfig):
        from data_pipelines.sources.tars import TarSource  # noqa: PLC0415

        return TarSource(config)
    if isinstance(config, TableSourceConfig):
        from data_pipelines.sources.table import TableSource  # noqa: PLC0415

        return TableSource(config)
    from data_pipelines.sources.latents import LatentsSource  # noqa: PLC0415

    return LatentsSource(config)
