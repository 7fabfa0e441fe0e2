import time
import traceback

import pytest

from data import servers
from data.servers import WebServer
from mae.data.store import connection
from mae.data.store.connection import filesystem_of, request
from mae.data.store.errors import MissingError
from mae.data.store.storage import Shard, read_range
from mae.data.store.urls import PACKAGES, scheme_of
from mae.errors import UserError

web, impatient = servers.web, servers.impatient


@pytest.mark.parametrize("fault", ["404", "403", "503", "cut", "flip", "redirect file:///etc/passwd", "closed"])
def test_x10_no_token_in_any_message_nor_in_the_chain_of_errors(web: WebServer, fault: str) -> None:
    web.files["/a.tar"], web.always = bytes(100), fault
    url = f"http://user:hidden1@127.0.0.1:{1 if fault == 'closed' else web.server_port}/a.tar?token=hidden2"
    with pytest.raises(UserError) as caught:
        read_range(Shard(url, 100, ""), 0, 50, lambda data: "it is flipped" if data[0] else None)
    text = "".join(traceback.format_exception(caught.value))
    assert "/a.tar" in str(caught.value)
    assert "hidden" not in text


@pytest.mark.parametrize("status", [404, 410, 401, 403, 400, 405])
def test_r07_what_cannot_pass_is_told_at_once(web: WebServer, status: int) -> None:
    web.always = str(status)
    with pytest.raises(UserError, match=rf"^{web.url}/a\.tar .*(does not exist|HTTP {status})"):
        request(f"{web.url}/a.tar?token=1", "info", seconds=10.0)
    assert len(web.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_r07_what_may_pass_is_tried_again_a_bounded_number_of_times(web: WebServer, status: int) -> None:
    web.always = str(status)
    message = rf"^{web.url}/a\.tar cannot be read, 3 attempts failed: HTTP {status}.*; check the network"
    with pytest.raises(UserError, match=message):
        read_range(Shard(f"{web.url}/a.tar?token=1", 100, ""), 0, 10)
    assert len(web.requests) == 3


def test_r07_time_bounds_the_attempts_too(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    web.always = "503"
    monkeypatch.setattr(connection, "SECONDS_IN_ALL", 0.0)
    with pytest.raises(UserError, match="1 attempts failed"):
        read_range(Shard(f"{web.url}/a.tar", 100, ""), 0, 10)


def test_r07_nobody_listens(impatient: None) -> None:
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:1/a\.tar cannot be read, 3 attempts failed: .*connect"):
        read_range(Shard("http://127.0.0.1:1/a.tar", 100, ""), 0, 10)


def unreachable(url: str) -> tuple[str, float]:
    """The message about a URL where nobody answers, and the seconds until it came."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        read_range(Shard(url, 100, ""), 0, 10)
    return str(caught.value), time.monotonic() - began


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid"])
def test_r07_a_host_that_has_never_answered_is_given_up_within_seconds(
    impatient: None, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(connection, "ATTEMPTS", 1000)
    monkeypatch.setattr(connection, "UNREACHABLE_SECONDS", 0.3)
    message, seconds = unreachable(f"http://{host}/a.tar")
    assert "has never answered and is tried for 0.3 s only: check its name" in message
    assert ", 1 attempts" not in message
    assert seconds < 5
    assert ", 1 attempts failed" in unreachable(f"http://{host}/b.tar")[0], "the next shards there do not wait again"


def test_r07_a_host_that_has_answered_may_be_away_for_longer(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingError):
        request(f"{web.url}/none.tar", "info", seconds=10.0)
    assert connection._answered == {f"127.0.0.1:{web.server_port}"}
    connection._answered.add("127.0.0.1:1")
    monkeypatch.setattr(connection, "UNREACHABLE_SECONDS", 0.0)
    message, _ = unreachable("http://127.0.0.1:1/a.tar")
    assert "3 attempts failed" in message
    assert "never answered" not in message


@pytest.mark.parametrize("url", ["http://[::1/a.tar", "http:///a.tar", "http://localhost:99999/a.tar"])
def test_r07_a_url_that_cannot_be_is_told_at_once(impatient: None, url: str) -> None:
    with pytest.raises(UserError, match=r"a\.tar cannot be read \(.*\); check the URL$"):
        request(url, "info", seconds=10.0)


def test_r07_a_server_without_tls_has_no_certificate(web: WebServer) -> None:
    with pytest.raises(UserError, match=r"^https://127.*its certificate is not trusted \(.*; check the URL, the clock"):
        request(f"https://127.0.0.1:{web.server_port}/a.tar", "info", seconds=10.0)


@pytest.mark.parametrize("scheme", sorted(PACKAGES))
def test_a_missing_package_is_named(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_filesystems", {})
    monkeypatch.setattr(connection, "_filesystem_class", _not_installed)
    with pytest.raises(UserError, match=rf"^{scheme}:// needs another package: pip install {PACKAGES[scheme]} \("):
        filesystem_of(f"{scheme}://bucket/a.tar")


def _not_installed(url: str) -> None:
    raise ImportError(f"No module for {scheme_of(url)}")


def test_one_file_system_serves_http_and_https_for_the_life_of_the_process() -> None:
    assert filesystem_of("http://a/b") is filesystem_of("https://c/d")


def test_a_name_unknown_to_the_server_is_told_from_one_denied(web: WebServer) -> None:
    with pytest.raises(MissingError):
        request(f"{web.url}/none.tar", "info", seconds=10.0)
