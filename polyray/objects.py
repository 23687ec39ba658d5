"""A dataset in an object store: the calls of `files.Place` as requests to S3, or to what speaks like it.

Which question it answers: *how do bytes reach a bucket?* Place in the flow: beside `files.py`, imported only for an OUT
such as `s3://bucket/prefix`; needs the extra `s3`. An object appears as a whole or not at all, and listings show at
once what was put; the one thing asked for beyond that is a conditional put, `If-None-Match: *`, which `prove` tries
out.
Credentials, region and endpoint (`AWS_ENDPOINT_URL`) are found as boto3 finds them.
"""

import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast
from urllib.parse import urlsplit

import boto3
import pyarrow.fs
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from polyray import files
from polyray.errors import StoreError

_MISSING = {"NoSuchKey", "404", "NotFound"}
_FORBIDDEN = {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_UNCONDITIONAL = {"NotImplemented", "501"}
_AT_ONCE = 16
_MOST_REMOVED = 1000
_CONFLICTS = 8


class Bucket:
    """A prefix of a bucket as a `files.Place`.

    Args:
        address: `s3://bucket/prefix`.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._address, self._bucket, self._prefix = address, parts.netloc, parts.path.strip("/")
        self._session = boto3.Session()
        config = Config(retries={"mode": "standard", "max_attempts": 5}, max_pool_connections=_AT_ONCE)
        with self._answered():
            self._client = self._session.client("s3", config=config)
        self._disk: tuple[object, pyarrow.fs.FileSystem] | None = None

    def at(self, name: str) -> str:
        """See `Place`."""
        return f"{self._address}/{name}" if name else self._address

    def prove(self) -> None:
        """See `Place`; puts one passing object twice.

        Raises:
            StoreError: the store put it twice, or knows no conditional put.
        """
        name = f".{uuid.uuid4().hex}.tmp"
        try:
            with self._answered():
                self._put_new(name, b"1")
                is_refused = not self._put_new(name, b"2")
        except _UnconditionalError as e:
            raise self._unfit(str(e)) from e
        self.remove([name])
        if not is_refused:
            raise self._unfit("it put an object over another all the same")

    def read(self, name: str) -> bytes:
        """See `Place`."""
        with self._answered(name):
            return cast(bytes, self._client.get_object(Bucket=self._bucket, Key=self._key(name))["Body"].read())

    def n_bytes(self, names: Iterable[str]) -> list[int | None]:
        """See `Place`."""
        names = list(names)
        if len(names) < 2:
            return [self._n_bytes(name) for name in names]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._n_bytes, names))

    def names(self, folder: str = "") -> list[str]:
        """See `Place`."""
        above = self._key(f"{folder}/" if folder else "")
        found = []
        for page in self._pages(Prefix=above, Delimiter="/"):
            found += [o["Key"] for o in page.get("Contents", ())]
            found += [p["Prefix"].rstrip("/") for p in page.get("CommonPrefixes", ())]
        return sorted(key[len(above) :] for key in found if len(key) > len(above))

    def files_below(self, folder: str) -> list[str]:
        """See `Place`."""
        above = self._key("")
        keys = (o["Key"] for page in self._pages(Prefix=self._key(f"{folder}/")) for o in page.get("Contents", ()))
        return sorted(key[len(above) :] for key in keys)

    def make_folder(self, folder: str = "") -> None:
        """See `Place`; a bucket has none."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See `Place`."""
        with self._answered(name):
            # The answer to a put can get lost, and the repeated request then finds what the first one put.
            return self._put_new(name, data) or self.read(name) == data

    def replace(self, name: str, data: bytes) -> None:
        """See `Place`."""
        with self._answered(name):
            self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=data)

    @contextmanager
    def stream(self, name: str) -> Iterator[files.Writer]:
        """See `Place`."""
        disk, above = self.filesystem()
        out = disk.open_output_stream(f"{above}/{name}")
        try:
            yield out
        except BaseException:
            # An upload cannot be given up through Arrow: it is ended, and what it made is removed.
            out.close()
            self.remove([name])
            raise
        out.close()

    def remove(self, names: Iterable[str]) -> None:
        """See `Place`."""
        left = iter(names)
        while some := [{"Key": self._key(name)} for name in islice(left, _MOST_REMOVED)]:
            with self._answered():
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": some, "Quiet": True})
            if errors := answer.get("Errors"):
                raise StoreError(f"cannot remove {errors[0]['Key']!r} from {self._address!r}: {errors[0]['Message']}.")

    def remove_folder(self, folder: str) -> None:
        """See `Place`."""
        self.remove(self.files_below(folder))

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """See `Place`."""
        with self._answered():
            found = self._session.get_credentials()
            if found is None:
                raise NoCredentialsError
            keys = found.get_frozen_credentials()
        # Passing credentials are renewed by boto3, which Arrow has to be told.
        if self._disk is None or self._disk[0] != keys:
            endpoint = urlsplit(self._client.meta.endpoint_url)
            self._disk = (
                keys,
                pyarrow.fs.S3FileSystem(
                    access_key=keys.access_key,
                    secret_key=keys.secret_key,
                    session_token=keys.token,
                    region=self._client.meta.region_name,
                    scheme=endpoint.scheme,
                    endpoint_override=endpoint.netloc,
                ),
            )
        return self._disk[1], "/".join(filter(None, (self._bucket, self._prefix)))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _pages(self, **what: str) -> Iterator[dict[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, **what)
        with self._answered():
            yield from pages

    def _n_bytes(self, name: str) -> int | None:
        try:
            with self._answered(name):
                answer = self._client.head_object(Bucket=self._bucket, Key=self._key(name))
        except FileNotFoundError:
            return None
        return int(answer["ContentLength"])

    def _put_new(self, name: str, data: bytes) -> bool:
        for attempt in range(_CONFLICTS):
            try:
                self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=data, IfNoneMatch="*")
                return True
            except ClientError as e:
                code = e.response["Error"]["Code"]
                if code in ("PreconditionFailed", "412"):
                    return False
                if code in _UNCONDITIONAL:
                    raise _UnconditionalError(str(e)) from e
                # Another put of the same object is under way; how it ends decides.
                if code not in ("ConditionalRequestConflict", "409") or attempt == _CONFLICTS - 1:
                    raise
                time.sleep(0.1 * 2**attempt)
        return False

    def _unfit(self, why: str) -> StoreError:
        return StoreError(
            f"{self._address!r} cannot hold a dataset: its store does not honour `If-None-Match: *` on a put ({why}), "
            "without which two drivers could both believe they were first. Choose another store, or a folder."
        )

    @contextmanager
    def _answered(self, name: str = "") -> Iterator[None]:
        """Turns what the store answers into errors that say what to do; what is not there is `FileNotFoundError`."""
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as e:
            raise StoreError(
                f"no credentials for {self._address!r}: {e}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a "
                "profile (AWS_PROFILE), on every node."
            ) from e
        except ClientError as e:
            code = e.response["Error"]["Code"]
            if code == "NoSuchBucket":
                raise StoreError(f"there is no bucket {self._bucket!r}. Make it, or mend the address.") from e
            if code in _MISSING:
                raise FileNotFoundError(2, "No such object", self.at(name)) from e
            what = "Check the credentials and what they allow" if code in _FORBIDDEN else files.RESUME.rstrip(".")
            raise StoreError(f"{self.at(name)!r} cannot be used: {e}. {what}.") from e
        except BotoCoreError as e:
            raise StoreError(f"{self._address!r} cannot be reached: {e}. {files.RESUME}") from e


class _UnconditionalError(Exception):
    pass
