import asyncio
from types import SimpleNamespace

import aiohttp
import pytest
import yarl

from data import servers
from data.servers import WebServer
from mae.data.store.errors import RangesIgnoredError
from mae.data.store.storage import Shard, find, read_range
from mae.data.store.web import _refuse_dangerous_redirect
from mae.errors import UserError

web, impatient = servers.web, servers.impatient

DATA = bytes(range(256)) * 40


@pytest.mark.parametrize("target", ["{url}/b.tar", "/b.tar", "b.tar", "//127.0.0.1:{port}/b.tar"])
def test_a_redirect_within_the_web_is_followed(web: WebServer, target: str) -> None:
    web.files["/b.tar"] = DATA
    web.faults = [f"redirect {target.format(url=web.url, port=web.server_port)}"]
    assert read_range(Shard(f"{web.url}/a.tar", len(DATA), ""), 5, 50) == DATA[5:50]
    assert [path for path, _ in web.requests] == ["/a.tar", "/b.tar"]


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/b.tar",
        "data:,x",
        "http://169.254.169.254/latest/meta-data/?token=hidden",
        "http://169.254.1.1:81/b.tar",
        "http://2852039166/",
        "http://[::ffff:169.254.169.254]/",
        "http://[fe80::1]/",
        "http://[fd00:ec2::254]/",
        "http://100.100.100.200/",
    ],
)
def test_x08_a_redirect_out_of_the_web_or_to_metadata_is_refused(web: WebServer, target: str) -> None:
    web.faults = [f"redirect {target}"]
    with pytest.raises(UserError, match=rf"^{web.url}/a\.tar redirects to .*, which is refused; allowed: ") as caught:
        read_range(Shard(f"{web.url}/a.tar?token=hidden", len(DATA), ""), 5, 50)
    assert "hidden" not in str(caught.value)
    assert len(web.requests) == 1


@pytest.mark.parametrize(
    ("start", "location", "is_refused"),
    [
        ("https://127.0.0.1/a", "http://127.0.0.1/b", True),
        ("https://127.0.0.1/a", "//127.0.0.1/b", False),
        ("https://127.0.0.1/a", "/b", False),
        ("http://127.0.0.1/a", "https://127.0.0.1/b", False),
    ],
)
def test_x08_a_redirect_from_https_to_http_is_refused(start: str, location: str, is_refused: bool) -> None:
    response = SimpleNamespace(headers={"Location": location})
    redirect = aiohttp.TraceRequestRedirectParams("GET", yarl.URL(start), {}, response)  # type: ignore[arg-type]
    check = _refuse_dangerous_redirect(None, SimpleNamespace(), redirect)  # type: ignore[arg-type]
    if is_refused:
        with pytest.raises(UserError, match="redirects to http://127"):
            asyncio.run(check)
    else:
        asyncio.run(check)


def test_redirects_in_a_circle_end(web: WebServer) -> None:
    web.always = "redirect /a.tar"
    with pytest.raises(UserError, match=r"/a\.tar cannot be read"):
        find([f"{web.url}/a.tar"])


def test_a_server_that_ignores_ranges_is_told_before_its_answer_is_read(web: WebServer) -> None:
    web.files["/a.tar"], web.has_ranges = DATA, False
    shard = Shard(f"{web.url}/a.tar", len(DATA), "")
    with pytest.raises(RangesIgnoredError):
        read_range(shard, 0, 50)
    assert len(web.requests) == 1
    assert read_range(shard, 0, len(DATA)) == DATA  # here all is what was asked for


def test_bytes_come_as_they_are_stored_whatever_the_server_says_of_their_encoding(web: WebServer) -> None:
    web.files["/a.tar.gz"], web.headers = DATA, {"Content-Encoding": "gzip"}
    (shard,) = find([f"{web.url}/a.tar.gz"])
    assert shard is not None
    assert shard.size == len(DATA)
    assert read_range(shard, 1, 50) == DATA[1:50]


def test_another_range_than_was_asked_for_is_not_taken(web: WebServer) -> None:
    web.files["/a.tar"], web.headers = DATA, {"Content-Range": f"bytes 7-56/{len(DATA)}"}
    with pytest.raises(UserError, match="3 attempts failed: the server sent a different range than requested"):
        read_range(Shard(f"{web.url}/a.tar", len(DATA), ""), 0, 50)
