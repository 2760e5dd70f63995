"""The clients of S3: boto3 for requests, s3fs for streams and globs, pyarrow for Parquet."""

import functools
import os
import re
import threading
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from wallaroo.model.errors import InputError
from wallaroo.workflows.storage.errors import NO_CREDENTIALS, explained
from wallaroo.workflows.storage.paths import bucket_and_key, is_s3

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.fs


CONNECT_SECONDS = 3
"""Most seconds until a connection to S3 is open."""
READ_SECONDS = 60
"""Most seconds until the next bytes of a response."""
ATTEMPTS = 4
"""Attempts of one request. An endpoint that does not answer is thus given up within half a minute."""
_retries = 0
_guard = threading.Lock()
# Sessions of boto3 may not be used by two threads at once, and each thread would make a client of its own.
_making = threading.RLock()


def take_retries() -> int:
    """Returns how many requests were retried since the last call.

    Retries within pyarrow are missing, since it does not report them.
    """
    global _retries
    with _guard:
        count, _retries = _retries, 0
    return count


def count_retries(count: int) -> None:
    """Adds to the count that `take_retries` returns."""
    global _retries
    with _guard:
        _retries += count


def _made_once(make: Callable[[], Any]) -> Any:
    """Caches what a function makes for the whole process; threads make it in turn."""
    cached = functools.cache(make)

    @functools.wraps(make)
    def get() -> Any:
        with _making:
            return cached()

    get.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return get


@_made_once
def session() -> Any:
    """boto3's session of this process."""
    import boto3.session

    return boto3.session.Session()


@_made_once
def s3_client() -> Any:
    """boto3's client of this process. It may be used from many threads."""
    import botocore.config

    config = botocore.config.Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=32,
        user_agent_extra="wallaroo-batch",
    )
    client = session().client("s3", config=config)
    client.meta.events.register("after-call.s3", _note_attempts)
    return client


def _note_attempts(parsed: dict[str, Any], **_: Any) -> None:
    """Counts the retries that botocore makes by itself."""
    count_retries(parsed.get("ResponseMetadata", {}).get("RetryAttempts", 0))


@_made_once
def s3_filesystem() -> Any:
    """s3fs's file system of this process, for streams and globs. It caches no listing."""
    import aiobotocore.session
    import s3fs

    own = aiobotocore.session.get_session()
    own.register("after-call.s3", _note_attempts)
    return s3fs.S3FileSystem(
        session=own,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
        },
    )


def forget_clients() -> None:
    """Drops the clients, so that the next use of S3 reads the AWS variables again."""
    with _making:  # a client that another thread is making now is dropped too
        for cached in (session, s3_client, s3_filesystem, _region):
            cached.cache_clear()


def _custom_endpoint() -> urllib.parse.SplitResult | None:
    """The endpoint; None if it is Amazon's own."""
    url = urllib.parse.urlsplit(s3_client().meta.endpoint_url)
    return None if re.search(r"\.amazonaws\.com(\.cn)?$", url.hostname or "") else url


@functools.cache
def _region(bucket: str) -> str:
    client = s3_client()
    if _custom_endpoint() is None:
        # Amazon serves a bucket in its region only. boto3 finds it; pyarrow must be told.
        return client.head_bucket(Bucket=bucket).get("BucketRegion") or client.meta.region_name
    region = client.meta.region_name
    return "us-east-1" if region in (None, "aws-global") else region


@functools.lru_cache(maxsize=8)
def _arrow_s3(access: str, secret: str, token: str | None, region: str, scheme: str, host: str | None) -> Any:
    import pyarrow.fs

    return pyarrow.fs.S3FileSystem(
        access_key=access,
        secret_key=secret,
        session_token=token,
        region=region,
        scheme=scheme,
        endpoint_override=host,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=READ_SECONDS,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        tls_ca_file_path=session()._session.get_config_variable("ca_bundle"),
    )


def parquet_filesystem(path: str) -> "tuple[pyarrow.fs.FileSystem, str]":
    """Returns pyarrow's file system for a path.

    Call it for every file, since it renews credentials that expire. Wrap the reading in `explained`.

    Args:
        path: Local or `s3://` path.

    Returns:
        The file system, and the path in its own form.

    Raises:
        InputError: There are no AWS credentials.
    """
    import pyarrow.fs

    if not is_s3(path):
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(path)
    bucket, key = bucket_and_key(path)
    with explained(path):
        with _making:
            credentials = session().get_credentials()
        if credentials is None:
            raise InputError(f"{path} cannot be used, {NO_CREDENTIALS}.")
        # pyarrow knows fewer kinds of profile than botocore, so it gets what botocore found.
        found = credentials.get_frozen_credentials()
        url = _custom_endpoint()
        region = _region(bucket)
        with _making:
            filesystem = _arrow_s3(
                found.access_key,
                found.secret_key,
                found.token,
                region,
                url.scheme if url else "https",
                url.netloc if url else None,
            )
    return filesystem, f"{bucket}/{key}"
