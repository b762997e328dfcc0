"""Object stores as far as they can be known without asking one: URIs, environment, failures.

The one place for the names of environment variables that say where stores are and who asks, for
what a URI may hold, and for whose fault a failure is. Connections are made by the packages that
read and write (`data_pipeline.object_stores`, `registry.places`). Secrets stay in the environment:
they reach neither records nor messages.

    StoreMistake (UserError)             a URI, the environment, or a right that is missing
    StoreFailure (EnvironmentFailure)    the store does not answer
"""

import os
import re
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from configs.errors import EnvironmentFailure, UserError, did_you_mean

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)(.*)", re.DOTALL)
_OPTIONS = re.compile(r"\?[\w.-]+=")
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_SHORTEST_SECRET = 8

# How the client libraries under pyarrow begin or mark the messages of a store: Amazon's, Google's,
# Azure's. Without such a mark an error is about the bytes of the file.
_OF_STORE = re.compile(r"AWS Error|google::cloud|Azure|curlCode|HTTP status \d", re.IGNORECASE)
_REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID"
    r"|INVALID_SIGNATURE|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|EXPIRED_?TOKEN"
    r"|InvalidToken|TokenRefreshRequired|HTTP status 40[13]"  # Amazon and its likes
    r"|PERMISSION_DENIED|UNAUTHENTICATED"  # Google
    r"|AuthenticationFailed|AuthorizationFailure|AuthorizationPermissionMismatch",  # Azure
    re.IGNORECASE,
)
_NO_BUCKET = re.compile(
    r"NO_SUCH_BUCKET|NoSuchBucket|ContainerNotFound|bucket does not exist", re.I
)
_NO_CLIENT = re.compile(r"libjvm|libhdfs", re.I)
_ELSEWHERE = re.compile(r"HTTP status 301|PermanentRedirect|AuthorizationHeaderMalformed", re.I)


class StoreMistake(UserError):
    """What the user can mend: a URI, the environment, or a right that is missing."""


class StoreFailure(EnvironmentFailure):
    """A store does not answer, or not as it should."""


class StoreUri(NamedTuple):
    """A URI, taken apart: `scheme://authority` and a path that begins with `/` or is empty."""

    scheme: str
    authority: str
    path: str


@dataclass(frozen=True)
class Limits:
    """How long a store is asked before it is given up."""

    attempts: int
    timeout_s: float

    @classmethod
    def from_environment(cls) -> "Limits":
        """LOCKSTEP_STORAGE_ATTEMPTS and LOCKSTEP_STORAGE_TIMEOUT_S, or 5 tries of 10 s.

        Raises:
            StoreMistake: One of them is no number in its range.
        """
        return cls(
            int(_number("LOCKSTEP_STORAGE_ATTEMPTS", "5", 1, 20)),
            _number("LOCKSTEP_STORAGE_TIMEOUT_S", "10", 1, 600),
        )

    def __str__(self) -> str:
        """For messages, such as `5 attempts of at most 10 s each`."""
        return f"{self.attempts} attempt(s) of at most {self.timeout_s:g} s each"


def is_remote(path: str) -> bool:
    """Whether a path is a URI of a store rather than a local path."""
    match = _URI.match(path)
    return match is not None and match[1] != "file"


def parse_uri(uri: str) -> StoreUri:
    """Take the URI of a file, a folder or a pattern apart.

    Raises:
        StoreMistake: It is not understood, or holds what belongs into the environment.
    """
    match = _URI.match(uri)
    scheme, authority, path = ("", "", "") if match is None else match.groups()
    if scheme not in SCHEMES:
        raise StoreMistake(
            f"paths that begin with {scheme}:// are not understood; local paths and "
            f"{', '.join(f'{known}://' for known in SCHEMES)} are.{did_you_mean(scheme, SCHEMES)}"
        )
    has_password = ":" in authority.rpartition("@")[0]
    if has_password or (scheme == "s3" and "@" in authority) or _OPTIONS.search(authority + path):
        raise StoreMistake(
            f"a path that begins with {scheme}:// holds credentials or options; a bucket and a "
            "path are allowed, so that no secret gets into reports. Put them into the environment, "
            "such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL_S3."
        )
    if (not authority and scheme != "hdfs") or any(letter in authority for letter in "*?["):
        raise StoreMistake(
            f"{uri!r} names no single bucket; {scheme}://bucket/path is allowed, with wildcards in "
            "the path only. Name the bucket."
        )
    return StoreUri(scheme, authority, path)


def is_of_store(error: Exception) -> bool:
    """Whether an error bears the mark of a store's client, and not of the bytes of a file."""
    return _OF_STORE.search(str(error)) is not None


def reason(path: str, error: Exception) -> str:
    """What an error met while reading `path` says, without secrets; of a store, with its limits.

    The text has no full stop at its end.
    """
    text = str(error).rstrip(". \n")
    if not is_remote(path):
        return text
    text = _without_secrets(text)
    is_counted = path.startswith("s3:") and _OF_STORE.search(text)
    return f"{text} (after {Limits.from_environment()})" if is_counted else text


def whereabouts(scheme: str) -> str:
    """Where the environment says that stores of a scheme are."""
    if scheme != "s3":
        return f"{scheme}://"
    options = S3Options.from_environment()
    return options.endpoint or f"Amazon S3, region {options.region}"


@dataclass(frozen=True)
class S3Options:
    """What the environment says of s3:// and of patience; secrets stay in the environment."""

    endpoint: str
    region: str
    access_key: str
    limits: Limits

    @classmethod
    def from_environment(cls) -> "S3Options":
        """As this process's environment says now.

        Raises:
            StoreMistake: A number in it is not in its range.
        """
        given = os.environ.get
        return cls(
            given("AWS_ENDPOINT_URL_S3") or given("AWS_ENDPOINT_URL") or "",
            given("AWS_REGION") or given("AWS_DEFAULT_REGION") or "us-east-1",
            given("AWS_ACCESS_KEY_ID", ""),
            Limits.from_environment(),
        )

    def address(self) -> dict[str, str]:
        """Scheme and place of an endpoint of one's own; empty for Amazon's.

        Raises:
            StoreMistake: The endpoint is no address.
        """
        if not self.endpoint:
            return {}
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
            raise StoreMistake(
                "AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL is no address of a store; "
                "http://host:port and https://host:port are allowed. Correct it."
            )
        # With an endpoint given, buckets are part of the path, not of the host's name.
        place = parts.netloc + parts.path.rstrip("/")
        return {"scheme": parts.scheme, "endpoint_override": place}


def explained(path: str, error: OSError, elapsed_s: float) -> StoreMistake | StoreFailure:
    """An error of a store as what it means, without secrets.

    Args:
        path: The URI that was worked on.
        error: What the client said.
        elapsed_s: How long it was tried.
    """
    text = _without_secrets(str(error).partition("\n")[0]).rstrip(". ")
    scheme = path.partition("://")[0]
    place = whereabouts(scheme)
    if _NO_CLIENT.search(text):
        return StoreMistake(
            f"{path}: {scheme}:// needs Java and Hadoop's client on this machine: {text}. Install "
            "them and set JAVA_HOME and HADOOP_HOME, or name files on another store."
        )
    if _REFUSED.search(text) or isinstance(error, PermissionError):
        return StoreMistake(
            f"{path}: the store ({place}) refuses access: {text}. Credentials that may read it are "
            f"needed. {_credentials_remedy(scheme)}"
        )
    if _NO_BUCKET.search(text):
        return StoreMistake(
            f"{path}: the store ({place}) has no such bucket: {text}. Check the bucket's name, and "
            "the endpoint and region in the environment."
        )
    if _ELSEWHERE.search(text):
        return StoreMistake(
            f"{path}: the bucket is not where it was looked for ({place}): {text}. Set AWS_REGION "
            "to the bucket's region."
        )
    patience = remedy = ""
    if scheme == "s3":
        patience = f" and {Limits.from_environment()}"
        remedy = (
            "; LOCKSTEP_STORAGE_ATTEMPTS and LOCKSTEP_STORAGE_TIMEOUT_S in the environment set the "
            "patience"
        )
    return StoreFailure(
        f"{path}: the store ({place}) failed: {text}. Gave up after {elapsed_s:.1f} s{patience}. "
        f"Check the store and the way to it, then start again{remedy}."
    )


def _credentials_remedy(scheme: str) -> str:
    if scheme != "s3":
        return "Set the environment variables that this store's client library reads."
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        return f"{' and '.join(missing)} not set in the environment: set them."
    return f"Check {' and '.join(names)} in the environment, and what they allow."


def _without_secrets(text: str) -> str:
    """The text without query strings, which hold signatures, and without the credentials."""
    text = re.sub(r"\?[^\s'\"]+", "", text)
    for name in _SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text


def _number(name: str, default: str, lowest: float, highest: float) -> float:
    text = os.environ.get(name) or default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not lowest <= value <= highest or (name.endswith("ATTEMPTS") and value % 1):
        raise StoreMistake(
            f"{name}={text} in the environment; a number from {lowest} to {highest} is allowed. "
            "Correct it, or unset it."
        )
    return value
