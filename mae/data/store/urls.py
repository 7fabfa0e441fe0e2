"""URLs of remote stores: their schemes, and how they are written in messages."""

import re
from urllib.parse import urlsplit, urlunsplit

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
"""The schemes of remote stores, and the package that reads each."""


def scheme_of(name: str) -> str:
    """`s3` of `s3://...`, in lower case; "" of a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", name)
    return match[1].lower() if match else ""


def is_web(url: str) -> bool:
    """Whether a web server is asked, which has no listings and no folders of its own."""
    return scheme_of(url) in ("http", "https")


def redacted(url: str) -> str:
    """`url` fit for messages: without user, password, query and fragment, any of which may hold a secret."""
    if is_web(url):
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    if scheme_of(url) == "hf":  # an @ stands before a revision there
        return url
    return re.sub(r"(?<=://)[^/@]*@", "", url, count=1)


def is_remote(name: str) -> bool:
    """Whether `name` is the URL of a remote store, and no path."""
    return scheme_of(name) in PACKAGES
