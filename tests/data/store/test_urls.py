import pytest

from mae.data.store.storage import Shard
from mae.data.store.urls import is_remote, redacted, scheme_of


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:password@host.org:81/a/b.tar?X-Amz-Signature=secret#part", "https://host.org:81/a/b.tar"),
        ("HTTP://host/a.tar?token=secret", "http://host/a.tar"),
        ("s3://key:secret@bucket/a-??.tar", "s3://bucket/a-??.tar"),
        ("hf://datasets/name/set@main/a.tar", "hf://datasets/name/set@main/a.tar"),
        ("/folder/a?b@c.tar", "/folder/a?b@c.tar"),
    ],
)
def test_x10_what_may_be_secret_is_not_shown(url: str, expected: str) -> None:
    assert redacted(url) == expected
    assert str(Shard(url, 1, "")) == expected
    assert "secret" not in repr(Shard(url, 1, ""))


@pytest.mark.parametrize(("name", "scheme"), [("S3://b/k", "s3"), ("a/b.tar", ""), ("a:b", ""), ("x+y://z", "x+y")])
def test_a_scheme_stands_before_colon_and_slashes(name: str, scheme: str) -> None:
    assert scheme_of(name) == scheme


def test_urls_of_the_five_schemes_are_remote() -> None:
    assert all(map(is_remote, ("s3://a/b", "gs://a/b", "hf://a/b", "http://a/b", "HTTPS://a/b")))
    assert not any(map(is_remote, ("a/b", "/a/b", "file:///a", "ftp://a/b", "s3:/a/b")))
