"""Raw data behind URLs: requests that are tried again, and names as folders have them.

Names that come out of a listing are plain, also where a server escapes them, and are escaped again where they are
opened; so a folder behind http(s) has the keys and classes that it has on disk.
"""

from __future__ import annotations

import errno
import html.parser
import io
import os
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from pomscale.base.errors import InputError
from pomscale.shards.location import find_filesystem, retried
from pomscale.sources.faults import ABOUT_PATH, PathError, told_apart, while_reading

T = TypeVar("T")

# A page that lists a million files takes about 200 MB; whatever is larger is the file of a user's mistake.
_MAX_PAGE_BYTES = 2**30
_PAGE_CHUNK_BYTES = 2**20


def is_url(path: str) -> bool:
    """Return whether a path is a URL, of any kind."""
    return "://" in path


def is_http(url: str) -> bool:
    """Return whether a URL is that of a web server, which has no listings but pages, and names with escapes."""
    return url.startswith(("http://", "https://"))


def escaped(root: str, name: str) -> str:
    """Return the part of a URL for a file that is called `name` below the folder or URL `root`."""
    return urllib.parse.quote(name, errors="surrogateescape") if is_http(root) else name


def plain(root: str, part: str) -> str:
    """Return the name for which `part` stands in the URLs below `root`."""
    return urllib.parse.unquote(part, errors="surrogateescape") if is_http(root) else part


# -- requests ----------------------------------------------------------------------------------------------------------


def requested(url: str, request: Callable[[fsspec.AbstractFileSystem, str], T]) -> T:
    """Return request(file system, path in it), tried again while storage fails.

    Raises:
        OSError: The URL is at fault (`faults.ABOUT_PATH`).
        PomscaleError: Storage keeps failing.
        InputError: There is no package for this kind of URL.
    """

    def attempt() -> T:
        try:
            return request(*find_filesystem(url))
        except Exception as error:  # every storage has errors of its own
            told = _told_apart(url, error)
            if told is error:
                raise
            raise told from error

    return retried(url, attempt, time.sleep, final=ABOUT_PATH)


def _told_apart(url: str, error: Exception) -> Exception:
    if is_http(url) and isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec gives this name to whatever keeps it from asking for a size
    return told_apart(url, error)


def read_url(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return the bytes from `start` to `end` of a file; all of them from an HTTP server that does not send parts."""
    return requested(url, lambda storage, path: storage.cat_file(path, start=start, end=end))


class RemoteFile(io.RawIOBase):
    """A file of which only the parts that are read are fetched. While it is read, it raises PomscaleError only."""

    def __init__(self, url: str) -> None:
        """Open the file. Raises the errors of `requested`."""
        self._url = url
        self._file = requested(url, lambda storage, path: storage.open(path, "rb"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with while_reading(self._url):
            content = requested(self._url, lambda *_: self._of_parts(lambda: self._file.read(len(buffer))))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._of_parts(lambda: self._file.seek(offset, whence))

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _of_parts(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except ValueError as error:  # fsspec's, where it gets the whole file instead
            raise InputError(
                f"{self._url}: its server does not send parts of files; download it first ({error})"
            ) from error


# -- listings ----------------------------------------------------------------------------------------------------------


def check_url(url: str) -> None:
    """Look whether a folder is there. Raises the errors of `requested`."""
    if is_http(url):
        requested(url, _read_page)
    else:
        requested(url, lambda storage, path: storage.info(path))


def list_url(url: str) -> list[tuple[str, bool, int | None]]:
    """Return name, whether it is a folder, and size in bytes if it is known, of all that lies in a folder.

    Raises the errors of `requested`.
    """
    return _list_page(url) if is_http(url) else requested(url, _list_storage)


def _list_storage(storage: fsspec.AbstractFileSystem, path: str) -> list[tuple[str, bool, int | None]]:
    found = storage.ls(path, detail=True)
    storage.invalidate_cache(path)  # or fsspec keeps all that was ever listed
    entries = []
    for info in found:
        if info["name"].rstrip("/") != path.rstrip("/"):  # object stores may list the folder itself
            is_folder = info["type"] == "directory"
            name = info["name"].rstrip("/").rpartition("/")[2]
            entries.append((name, is_folder, None if is_folder else info.get("size")))
    return entries


def _list_page(url: str) -> list[tuple[str, bool, int | None]]:
    """Return what a server's page of a folder links to, if it lies in that folder itself.

    Pages link to other places, too: to the folder above, to themselves in another order (?C=M). fsspec's own listing
    keeps some of these, does not decode &amp;, and ends a name at an apostrophe.
    """
    base = url.rstrip("/") + "/"
    page = _Links()
    page.feed(requested(url, _read_page))
    found: dict[str, bool] = {}
    for link in page.links:
        target = urllib.parse.urljoin(base, link).partition("#")[0].partition("?")[0]
        # Behind a proxy, pages may link to http:// where https:// was asked for.
        path, folder = (plain(url, each).partition("://")[2] for each in (target, base))
        name = path.removeprefix(folder).rstrip("/") if path.startswith(folder) else ""
        if name and "/" not in name:
            found[name] = path.endswith("/") or found.get(name, False)
    return [(name, is_folder, None) for name, is_folder in found.items()]


def _read_page(storage: fsspec.AbstractFileSystem, path: str) -> str:
    content = bytearray()
    # With a size, whichever, fsspec sends no request for it; block size 0 is one request for all of the page.
    with storage.open(path, "rb", block_size=0, size=1) as stream:
        while chunk := stream.read(_PAGE_CHUNK_BYTES):
            content += chunk
            if len(content) > _MAX_PAGE_BYTES:
                raise PathError(errno.EINVAL, "this is no page that lists a folder", path)
    return content.decode(errors="replace")


class _Links(html.parser.HTMLParser):
    """Collects where the links of a page lead."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]
