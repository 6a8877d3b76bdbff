"""Requests to object stores through obstore: Amazon S3 and what speaks its protocol, Google Cloud
Storage, Azure Blob Storage. Sent again where that can help, one clear line where it cannot.

Two layers of retries. obstore's own is for a single HTTP request: 5xx answers, 429, connections
that cannot be made, break off or stall. Above it whole operations are begun anew where obstore
gives up: on a broken answer (of a listing, or of the request that ends a multipart upload), and
after `ATTEMPT_S`, since a call of obstore cannot be interrupted. All ends `retry_s()` after the
first attempt.

What an object store refuses for good (no such bucket, wrong credentials) is found out by one small
request when a process first meets a bucket, within `PROBE_S`, and raised as ObjectStoreError.

Credentials, region and endpoint are obstore's (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL):
docs/object-stores.md.
"""

from __future__ import annotations

import errno
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from featcache.errors import ConfigError, ObjectStoreError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from featcache.object_helper import Helper

SCHEMES = ("s3", "gs", "az")
DEFAULT_RETRY_S = 240.0
"""How long an outage is waited for; object_store's own advice is to stay below 5 minutes."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
"""Between two attempts: doubled each time, with jitter, up to here."""
PROBE_S = 10.0
ATTEMPT_S = 20.0
"""Of obstore's own retries; Ctrl-C waits for them."""
CONNECT_S = 5.0
STALLED_S = 30.0
"""Without a byte of the answer, a request counts as lost and is sent again."""
REQUEST_S = 120.0
"""A whole request; parts of `PART_BYTES` then need 70 KB/s."""
PART_BYTES = 8 << 20
PARTS_AT_ONCE = 4
"""Of a multipart upload: together the memory that it takes, 32 MB."""

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "InvalidBucketName")
_BAD_CREDENTIALS = (
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
    "InvalidSecurity", "TokenRefreshRequired", "AuthenticationFailed", "InvalidClientTokenId",
    "UnauthorizedAccess", "AuthenticationRequired", "InvalidAuthenticationInfo",
)  # fmt: skip
_CREDENTIAL_HOSTS = ("169.254.", "metadata.google.internal", "/oauth2/")
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN with temporary ones)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a service account's file",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or a SAS token)",
}

T = TypeVar("T")


def retry_s() -> float:
    """Seconds that an outage may last: FEATCACHE_RETRY_S, or `DEFAULT_RETRY_S`.

    Raises ConfigError.
    """
    given = os.environ.get("FEATCACHE_RETRY_S", str(DEFAULT_RETRY_S))
    try:
        value = float(given)
        if not 0 <= value < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(f"FEATCACHE_RETRY_S={given}: must be seconds, e.g. 240") from None
    return value


class _Clients:
    """One client for each bucket of this process; in a forked one, perhaps a helper instead."""

    def __init__(self) -> None:
        self.of: dict[str, ObjectStore] = {}
        self.helper: Helper | None = None
        self.used = False
        self.lock = threading.Lock()


_clients = _Clients()
_used_before_fork = False


def client(bucket: str) -> ObjectStore:
    """bucket: "s3://name". One for each process, made and tried out when it is first asked for.

    Raises ObjectStoreError where the bucket cannot be used, ConfigError without obstore.
    """
    with _clients.lock:
        found = _clients.of.get(bucket)
        if found is None:
            _clients.used = True
            _probe(bucket, _open(bucket, min(PROBE_S, retry_s())))
            found = _clients.of[bucket] = _open(bucket, min(ATTEMPT_S, retry_s()))
        return found


def _begin_anew_after_a_fork() -> None:
    """The child has none of the threads that obstore works with, and cannot start them again:
    featcache/object_helper.py."""
    global _clients, _used_before_fork
    _used_before_fork = _used_before_fork or _clients.used
    _clients = _Clients()


os.register_at_fork(after_in_child=_begin_anew_after_a_fork)


def _open(bucket: str, at_most_s: float) -> ObjectStore:
    try:
        from obstore.store import AzureStore, GCSStore, S3Store
    except ModuleNotFoundError:
        raise ConfigError(f"{bucket} needs obstore: pip install 'featcache[s3]'") from None
    scheme, _, name = bucket.partition("://")
    options: dict[str, Any] = {
        "client_options": {
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "read_timeout": timedelta(seconds=STALLED_S),
            "timeout": timedelta(seconds=REQUEST_S),
        },
        "retry_config": {
            "backoff": {
                "init_backoff": timedelta(seconds=FIRST_WAIT_S),
                "max_backoff": timedelta(seconds=LONGEST_WAIT_S),
                "base": 2,
            },
            "max_retries": 10_000,  # the time decides
            "retry_timeout": timedelta(seconds=at_most_s),
        },
    }
    if _endpoint(scheme).startswith("http://"):  # who writes that means it
        options["client_options"]["allow_http"] = True
    try:
        if scheme == "s3":
            return S3Store(name, **options)
        if scheme == "gs":
            return GCSStore(name, **options)
        return AzureStore(name, **options)
    except Exception as error:  # obstore has no common base of what a wrong setting raises
        raise ObjectStoreError(f"{bucket}: {_first_line(error)}; {_CREDENTIALS[scheme]}") from None


def _endpoint(scheme: str) -> str:
    if scheme == "s3":
        return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if scheme == "az":
        return os.environ.get("AZURE_STORAGE_ENDPOINT", "")
    return ""


def _probe(bucket: str, store: ObjectStore) -> None:
    """Ask for an object that is not there: the answer tells a missing bucket, credentials that are
    refused, and an endpoint that nobody listens at.

    Nothing else is raised: a server that is overloaded now may answer later.
    """
    import obstore

    try:
        obstore.get(store, "featcache-probe")
    except Exception as error:
        found = explain(error, f"{bucket}/featcache-probe", PROBE_S)
        if isinstance(found, ObjectStoreError) and (not is_transient(error) or _is_unsent(error)):
            raise found from None


def request(url: str, bucket: str, ask: Callable[[ObjectStore], T]) -> T:
    """What `ask` makes of the bucket's client, again where what went wrong may pass.

    Raises what `explain` says: OSError kinds, ObjectStoreError.
    """
    if _used_before_fork:
        from featcache.object_helper import Helper

        with _clients.lock:
            _clients.helper = _clients.helper or Helper()
        found: T = _clients.helper.request(url, bucket, ask)
        return found
    store = client(bucket)
    start, wait = time.monotonic(), FIRST_WAIT_S
    while True:
        try:
            return ask(store)
        except Exception as error:
            spent = time.monotonic() - start
            if not is_transient(error) or spent + wait > retry_s():
                raise explain(error, url, spent) from None
        time.sleep(wait * random.uniform(0.5, 1))
        wait = min(2 * wait, LONGEST_WAIT_S)


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    from obstore.exceptions import GenericError

    text = str(error)
    if isinstance(error, FileNotFoundError):
        # A multipart upload that was in fact completed, by a request whose answer was lost.
        return "NoSuchUpload" in text
    if not isinstance(error, GenericError) or _is_about_credentials(text):
        return False
    status = _status(text)
    return status is None or (status >= 500 and status != 501) or status in (408, 429)


def explain(error: Exception, url: str, spent_s: float) -> Exception:
    """What to raise for what obstore raised: FileNotFoundError, FileExistsError, PermissionError or
    another OSError about the object at `url`; ObjectStoreError where no object of the bucket can be
    had; anything else as it is, for that is a bug."""
    from obstore import exceptions

    text, scheme = str(error), url.partition("://")[0]
    name = url.split("/")[2]
    status, code = _status(text), _code(text)
    at = f" at {_endpoint(scheme)}" if _endpoint(scheme) else ""
    if code in _NO_BUCKET:
        other = ", and AWS_ENDPOINT_URL where it is not Amazon's" if scheme == "s3" else ""
        return ObjectStoreError(f"{url}: there is no bucket {name!r}{at}; check the address{other}")
    if _is_about_credentials(text):
        return ObjectStoreError(f"{url}: no credentials were found; {_CREDENTIALS[scheme]}")
    if code in _BAD_CREDENTIALS or isinstance(error, exceptions.UnauthenticatedError):
        return ObjectStoreError(
            f"{url}: the credentials were refused{at} ({code or status}); {_CREDENTIALS[scheme]}"
        )
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such object", url)
    if isinstance(error, exceptions.AlreadyExistsError | exceptions.PreconditionError):
        return FileExistsError(errno.EEXIST, "it was written meanwhile", url)
    if isinstance(error, exceptions.PermissionDeniedError) or status == 403:
        return PermissionError(errno.EACCES, f"access denied{at} ({code or status})", url)
    if "redirect" in text.lower() or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return ObjectStoreError(f"{url}: the bucket is in another region; set AWS_REGION to it")
    if isinstance(error, exceptions.InvalidPathError) or text.startswith("Could not parse path"):
        return OSError(errno.EINVAL, "is no name of an object", url)
    if status in (501, 405) or isinstance(
        error, exceptions.NotSupportedError | NotImplementedError
    ):
        return OSError(errno.ENOTSUP, f"the server does not support this request ({code})", url)
    if status == 416:
        return OSError(errno.ERANGE, "the object ends before", url)
    if isinstance(error, exceptions.GenericError):
        if status is not None and status < 500 and status not in (408, 429):
            return OSError(errno.EIO, f"refused with {status} {code}".rstrip(), url)
        return ObjectStoreError(
            f"{url}: no good answer{at} for {spent_s:.0f} s ({_why(text)}); check the address and "
            "the network; run the same command again to go on"
        )
    return error


def _is_about_credentials(text: str) -> bool:
    return any(host in text for host in _CREDENTIAL_HOSTS)


def _is_unsent(error: Exception) -> bool:
    """Whether nobody was there to answer."""
    return _why(str(error)) in ("connection refused", "no such host", "it cannot be connected to")


def _status(text: str) -> int | None:
    found = re.search(r"status code: (\d{3})", text)
    return int(found[1]) if found else None


def _code(text: str) -> str:
    found = re.search(r"<Code>(\w+)</Code>", text)
    return found[1] if found else ""


def _why(text: str) -> str:
    if (status := _status(text)) is not None:
        return f"HTTP {status} {_code(text)}".rstrip()
    for sign, meaning in (
        ("dns error", "no such host"),
        ("Connection refused", "connection refused"),
        ("ConnectionRefused", "connection refused"),
        ("kind: Connect,\n", "it cannot be connected to"),
        ("TimedOut", "timed out"),
        ("kind: Timeout", "timed out"),
        ("kind: Interrupted", "connection cut"),
        ("kind: Body", "connection cut"),
    ):
        if sign in text:
            return meaning
    return text.split("\n")[0][-120:]


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def blocks(parts: Sequence[bytes | memoryview | int]) -> Iterator[memoryview]:
    """`files.publish`'s parts as blocks of at most 1 MB, holes as zeros."""
    for part in parts:
        if isinstance(part, int):
            for start in range(0, part, len(_ZEROS)):
                yield memoryview(_ZEROS)[: part - start]
        else:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), len(_ZEROS)):
                yield view[start : start + len(_ZEROS)]


_ZEROS = bytes(1 << 20)
