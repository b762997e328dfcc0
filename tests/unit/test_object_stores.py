"""Where a store is said to be, how long it is asked, and whose fault a failure is."""

import os
from typing import Any

import pytest
from pyarrow import fs

from configs.errors import UserError
from configs.stores import Limits, reason
from data_pipeline import object_stores
from data_pipeline.errors import DataError, ReadError
from data_pipeline.object_stores import failures_of, store_of
from tests.support.stores import forget_stores

SECRET = "wJalrXUtnFEMI-K7MDENG"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_stores(monkeypatch)


class FakeS3:
    """Takes what pyarrow's client takes."""

    def __init__(self, **options: Any) -> None:
        self.options = options


@pytest.fixture
def fake_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    object_stores._connect.cache_clear()
    monkeypatch.setattr(fs, "S3FileSystem", FakeS3)


def options_of(uri: str) -> dict[str, Any]:
    options = dict(store_of(uri).system.options)
    options["attempts"] = options.pop("retry_strategy").max_attempts
    return options


def test_the_environment_says_where_a_store_is(fake_s3, monkeypatch):
    patience = {"connect_timeout": 10, "request_timeout": 10, "attempts": 5}
    assert options_of("s3://bucket/x") == {"region": "us-east-1", **patience}
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert options_of("s3://bucket/x")["region"] == "eu-west-1"
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://elsewhere")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000/")
    monkeypatch.setenv("LOCKSTEP_STORAGE_ATTEMPTS", "2")
    monkeypatch.setenv("LOCKSTEP_STORAGE_TIMEOUT_S", "1.5")
    assert options_of("s3://bucket/x") == {
        "region": "eu-north-1",
        "scheme": "http",
        "endpoint_override": "127.0.0.1:9000",
        "connect_timeout": 1.5,
        "request_timeout": 1.5,
        "attempts": 2,
    }
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    assert options_of("s3://bucket/x")["endpoint_override"] == "elsewhere"


def test_a_connection_is_made_once_a_process(fake_s3, monkeypatch):
    mine = store_of("s3://bucket/x")
    assert store_of("s3://bucket/y") is mine
    assert store_of("s3://other/x") is not mine
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert store_of("s3://bucket/x") is not mine


@pytest.mark.parametrize("value", ["127.0.0.1:9000", "ftp://host", f"http://me:{SECRET}@host"])
def test_endpoints_that_are_no_address(fake_s3, monkeypatch, value):
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    with pytest.raises(DataError) as error:
        store_of("s3://bucket/x")
    assert str(error.value) == (
        "AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL is no address of a store; http://host:port and "
        "https://host:port are allowed. Correct it."
    )


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("LOCKSTEP_STORAGE_ATTEMPTS", "0", "1 to 20"),
        ("LOCKSTEP_STORAGE_ATTEMPTS", "2.5", "1 to 20"),
        ("LOCKSTEP_STORAGE_ATTEMPTS", "many", "1 to 20"),
        ("LOCKSTEP_STORAGE_TIMEOUT_S", "nan", "1 to 600"),
        ("LOCKSTEP_STORAGE_TIMEOUT_S", "601", "1 to 600"),
    ],
)
def test_patience_out_of_range(monkeypatch, name, value, allowed):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^{name}={value} in the environment; a .* {allowed} is"):
        Limits.from_environment()


def failure(text: str, path: str = "s3://bucket/x", kind: type[OSError] = OSError) -> Exception:
    with pytest.raises((DataError, ReadError)) as error, failures_of(path):
        raise kind(text)
    return error.value


@pytest.mark.parametrize(
    "text",
    [
        "AWS Error ACCESS_DENIED during HeadObject operation: No response body.",
        "AWS Error INVALID_ACCESS_KEY_ID during GetObject operation: no such key",
        "AWS Error UNKNOWN (HTTP status 403) during HeadObject operation: No response body",
        "google::cloud::Status(PERMISSION_DENIED: Permanent error in GetObjectMetadata)",
    ],
)
def test_a_store_that_refuses_is_the_users_mistake(text):
    error = failure(text)
    assert isinstance(error, DataError)
    assert str(error) == (
        f"s3://bucket/x: the store (Amazon S3, region us-east-1) refuses access: "
        f"{text.rstrip('.')}. Credentials that may read it are needed. AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY not set in the environment: set them."
    )
    assert "client library" in str(failure(text, "gs://bucket/x"))


def test_what_else_is_the_users_mistake(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA0123456789")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    refused = failure(f"AWS Error ACCESS_DENIED: AKIA0123456789 {SECRET} http://h/x?X-Amz=y z")
    assert "ACCESS_DENIED: *** *** http://h/x z. " in str(refused)
    assert str(refused).endswith(
        "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, and what they allow."
    )
    missing = failure("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: none")
    assert isinstance(missing, DataError)
    assert "has no such bucket" in str(missing)
    elsewhere = failure("AWS Error UNKNOWN (HTTP status 301) during HeadBucket operation: none")
    assert isinstance(elsewhere, DataError)
    assert str(elsewhere).endswith("Set AWS_REGION to the bucket's region.")
    assert isinstance(failure("no", "hdfs://host/x", PermissionError), DataError)


@pytest.mark.parametrize(
    "text",
    [
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.",
        "AWS Error SLOW_DOWN during HeadObject operation: Please reduce your request rate.",
        "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, no connection",
    ],
)
def test_a_store_that_fails_is_not_the_users_mistake(text):
    error = failure(text)
    assert isinstance(error, ReadError)
    assert (error.exit_status, error.is_retryable) == (3, True)
    assert str(error) == (
        f"s3://bucket/x: the store (Amazon S3, region us-east-1) failed: {text.rstrip('.')}. Gave "
        "up after 0.0 s and 5 attempt(s) of at most 10 s each. Check the store and the way to it, "
        "then start again; LOCKSTEP_STORAGE_ATTEMPTS and LOCKSTEP_STORAGE_TIMEOUT_S in the "
        "environment set the patience."
    )


def test_only_what_counts_for_a_store_is_said_of_it():
    error = failure("google::cloud::Status(UNAVAILABLE: try later)", "gs://bucket/x")
    assert str(error) == (
        "gs://bucket/x: the store (gs://) failed: google::cloud::Status(UNAVAILABLE: try later). "
        "Gave up after 0.0 s. Check the store and the way to it, then start again."
    )
    error = failure("Unable to load libjvm\ndlopen failed", "hdfs://host/x")
    assert isinstance(error, DataError)
    assert str(error) == (
        "hdfs://host/x: hdfs:// needs Java and Hadoop's client on this machine: Unable to load "
        "libjvm. Install them and set JAVA_HOME and HADOOP_HOME, or name files on another store."
    )


@pytest.mark.parametrize(
    ("uri", "prefix", "inner"),
    [
        ("gs://bucket/x/y", "gs://bucket", "bucket/x/y"),
        (
            "abfs://files@account.dfs.core.windows.net/x/y",
            "abfs://files@account.dfs.core.windows.net",
            "files/x/y",
        ),
        (
            "abfss://account.dfs.core.windows.net/files/x",
            "abfss://account.dfs.core.windows.net/",
            "files/x",
        ),
    ],
)
def test_names_of_other_stores_go_both_ways(uri, prefix, inner):
    store = store_of(uri)
    assert (store.prefix, store.inner(uri), store.uri(inner)) == (prefix, inner, uri)


def test_what_is_no_failure_of_a_store_stays_what_it_is():
    with pytest.raises(FileNotFoundError), failures_of("s3://bucket/x"):
        raise FileNotFoundError
    with pytest.raises(OSError, match="^bad"), failures_of("x"):
        raise OSError("bad")
    with pytest.raises(OSError, match="^bad"), failures_of("s3://bucket/x", is_reading=True):
        raise OSError("bad bytes")
    with pytest.raises(ReadError), failures_of("s3://bucket/x", is_reading=True):
        raise OSError("AWS Error SLOW_DOWN")


def test_the_reason_of_a_failed_read_tells_how_long_a_store_was_asked():
    assert reason("x", OSError("AWS Error.")) == "AWS Error"
    assert reason("s3://bucket/x", OSError("bad bytes.\n")) == "bad bytes"
    assert reason("s3://bucket/x", OSError("AWS Error SLOW_DOWN")) == (
        "AWS Error SLOW_DOWN (after 5 attempt(s) of at most 10 s each)"
    )
