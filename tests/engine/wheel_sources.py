"""Source files of libraries at the versions that a requirement allows, read out of their wheels.

A CUDA wheel is half a gigabyte and the file of interest 20 KB: a zip archive has its directory at
the end, so HTTP ranges fetch that and the file, 1.4 MB for torch. Read rather than imported: that
needs neither the libraries' dependencies nor a GPU, and both ends of a pin side by side.
"""

import io
import json
import re
import ssl
import subprocess
import sys
import urllib.request
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

CACHE = Path(__file__).parents[2] / "build" / "library_sources"
_SIMPLE = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
_TIMEOUT_S = 30


class Unavailable(Exception):
    """The index cannot be read from here; the message says why, without its address."""


def ends(requirement: Requirement) -> tuple[Version, Version]:
    """The lowest and the highest final release on the index that the requirement allows."""
    wheels = _wheels(requirement.name)
    if not wheels:
        raise Unavailable(f"the package index has no wheel of {requirement.name}")
    allowed = sorted(requirement.specifier.filter(wheels))
    assert allowed, f"no release fits {requirement}"
    return allowed[0], allowed[-1]


def source(project: str, version: Version, path: str) -> str:
    """The file `path` in the wheel of this version; it is kept, since a release never changes."""
    kept = CACHE / f"{canonicalize_name(project)}-{version}" / path
    if not kept.exists():
        url = _wheels(project)[version]
        with _reading(), zipfile.ZipFile(io.BufferedReader(_Ranges(url), 1 << 16)) as wheel:
            data = wheel.read(path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        partial.write_bytes(data)
        partial.replace(kept)
    return kept.read_text()


@cache
def _wheels(project: str) -> dict[Version, str]:
    """A wheel of each version for Linux on x86-64: the one that a machine with a GPU gets."""
    page = f"{_index_url().rstrip('/')}/{canonicalize_name(project)}/"
    with _reading(), _open(page, Accept=_SIMPLE) as answer:
        address, text = answer.url, answer.read().decode()
        is_json = "json" in answer.headers.get("Content-Type", "")
    found: dict[Version, str] = {}
    for name, url in _files(text, is_json):
        try:
            _, version, _, tags = parse_wheel_filename(name)
        except InvalidWheelFilename:
            continue
        if any(re.fullmatch(r"any|manylinux.*_x86_64", tag.platform) for tag in tags):
            found.setdefault(version, urljoin(address, url))
    return found


def _files(text: str, is_json: bool) -> list[tuple[str, str]]:
    """Name and URL of every file of a project that is not yanked (PEP 691, PEP 503)."""
    if is_json:
        files = json.loads(text)["files"]
        return [(file["filename"], file["url"]) for file in files if not file.get("yanked")]
    links = re.findall(r"<a\s([^>]*)>([^<]+)</a>", text)
    hrefs = [(name, re.search(r'href="([^"#]+)', attributes)) for attributes, name in links
             if "data-yanked" not in attributes]  # fmt: skip
    return [(name.strip(), href[1]) for name, href in hrefs if href]


def _index_url() -> str:
    """The index that pip is configured for, or else the one that it has built in.

    Pip is asked in a process of its own: where it is imported, setuptools cannot be any more, and
    PyTorch's compiler needs that (`_distutils_hack` gives way to pip)."""
    built_in = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    found = _pip_setting("index-url") or _output("-c", built_in).strip()
    if not found:
        raise Unavailable("pip, which knows the package index, is not installed")
    return found


def _output(*arguments: str) -> str:
    """What Python prints for these arguments, nothing if it fails."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@cache
def _pip_setting(name: str) -> str | None:
    """What pip is configured for, in its order of ranks: the environment, then its files."""
    listed = _output("-m", "pip", "config", "list")
    settings = dict(re.findall(rf"^(\S+)\.{name}='(.*)'$", listed, re.M))
    ranked = [settings.get(level) for level in (":env:", "install", "global")]
    return next(filter(None, ranked), None)


@contextmanager
def _reading() -> Iterator[None]:
    """Turns a failure of the network into Unavailable; a file missing in a wheel stays an error."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise Unavailable(f"the package index cannot be read ({reason})") from None


def _open(url: str, **headers: str):
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("no HTTP")
    if parts.username is not None:  # urllib takes no credentials in an address
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {b64encode(login.encode()).decode()}"
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = urllib.request.Request(url, headers=headers)
    trusted = ssl.create_default_context(cafile=_pip_setting("cert"))
    return urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=trusted)


class _Ranges(io.RawIOBase):
    """A file behind a URL, of which only what is read is fetched."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url, self._position = url, 0
        with _open(url, Range="bytes=0-0") as answer:
            if answer.status != 206:
                raise Unavailable("the package index does not serve ranges of a file")
            self._size = int(answer.headers["Content-Range"].rpartition("/")[2])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer) -> int:
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        last = self._position + count - 1
        with _open(self._url, Range=f"bytes={self._position}-{last}") as answer:
            data = answer.read()
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
