"""URLs of remote stores: their schemes, and their text in messages."""

import re
from urllib.parse import urlsplit, urlunsplit

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
"""Python package that reads each scheme of remote store."""


def scheme_of(name: str) -> str:
    """Return the scheme of a URL in lower case, such as `s3`; "" for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", name)
    return match[1].lower() if match else ""


def is_remote(name: str) -> bool:
    """Return whether `name` is the URL of a remote store rather than a path."""
    return scheme_of(name) in PACKAGES


def is_web(url: str) -> bool:
    """Return whether `url` is on a web server, which has neither listings nor folders."""
    return scheme_of(url) in ("http", "https")


def host_of(url: str) -> str:
    """Return the host and port of a web URL; the scheme of another URL, whose host is that of a cloud."""
    return redacted(url).partition("://")[2].partition("/")[0] if is_web(url) else scheme_of(url)


def redacted(url: str) -> str:
    """Return `url` for messages: without user, password, query and fragment, which may hold secrets."""
    if is_web(url):
        try:
            parts = urlsplit(url)
        except ValueError:  # brackets that are no address
            return re.sub(r"[?#].*", "", re.sub(r"(?<=://)[^/]*@", "", url, count=1))
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    if scheme_of(url) == "hf":  # there, an @ precedes a revision
        return url
    return re.sub(r"(?<=://)[^/@]*@", "", url, count=1)
