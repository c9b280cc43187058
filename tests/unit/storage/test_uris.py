"""Which filesystem a URI means, and which path inside it."""

from __future__ import annotations

import pytest
from botocore import UNSIGNED

from stego_core.errors import InputError
from stego_core.storage import uris


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    """Filesystems are made anew, as the environment of the test says."""
    for name in ("STEGO_S3_ANONYMOUS", "STEGO_S3_ADDRESSING", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    uris._s3.cache_clear()
    yield
    uris._s3.cache_clear()


@pytest.mark.parametrize("name", ["a b.jpg", "a#b.jpg", "100%25.jpg", "x?y=1.jpg", "\u00fc.jpg"])
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_the_name_of_an_object_is_taken_as_it_is(scheme, name):
    _, path = uris.open_uri(f"{scheme}://bucket/a folder/{name}")
    assert path == f"bucket/a folder/{name}"


def test_a_bucket_alone_is_its_root():
    assert uris.open_uri("gs://bucket")[1] == uris.open_uri("gs://bucket/")[1] == "bucket"


def test_the_objects_of_a_bucket_share_a_filesystem():
    assert uris.open_uri("gs://bucket/a")[0] is uris.open_uri("gs://bucket/b")[0]


@pytest.mark.parametrize("uri", ["adl://store/x", "hdfs://127.0.0.1:1/x"])
def test_a_filesystem_that_can_not_be_had_is_told_in_one_line(uri):
    with pytest.raises(InputError, match=r"can.t be opened: .*") as caught:
        uris.open_uri(uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("root", "joined"),
    [
        ("memory://", "memory://a/b"),
        ("hdfs:///", "hdfs:///a/b"),
        ("gs://bucket/", "gs://bucket/a/b"),
        ("/", "/a/b"),
    ],
)
def test_parts_are_joined_to_any_root(root, joined):
    assert uris.join(root, "a", "b") == joined


def test_an_unknown_scheme_is_told():
    with pytest.raises(InputError, match="no filesystem knows 'nosuch://'"):
        uris.open_uri("nosuch://x/y")


def test_an_open_bucket_is_asked_without_a_signature(monkeypatch):
    assert uris.s3_client().meta.config.signature_version != UNSIGNED
    monkeypatch.setenv("STEGO_S3_ANONYMOUS", "1")
    assert uris.s3_client().meta.config.signature_version == UNSIGNED


@pytest.mark.parametrize(("style", "host"), [(None, "127.0.0.1"), ("virtual", "bucket.store.test")])
def test_the_addressing_is_by_path_at_an_endpoint_or_as_asked(monkeypatch, style, host):
    if style:
        monkeypatch.setenv("STEGO_S3_ADDRESSING", style)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.test")
    monkeypatch.setenv("STEGO_S3_ANONYMOUS", "1")
    asked = uris.s3_client().generate_presigned_url(
        "get_object", Params={"Bucket": "bucket", "Key": "x"}
    )
    assert asked.split("/")[2].split(":")[0] == host


def test_another_addressing_is_refused(monkeypatch):
    monkeypatch.setenv("STEGO_S3_ADDRESSING", "paths")
    with pytest.raises(InputError, match="STEGO_S3_ADDRESSING is 'paths'"):
        uris.open_uri("s3://bucket/x")


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_both_clients_ask_the_same_region(monkeypatch, name):
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv(name, "cn-north-1")
    assert uris.s3_client().meta.region_name == uris.open_uri("s3://b/x")[0].region == "cn-north-1"
