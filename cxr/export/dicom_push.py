"""Send exported objects to a PACS with STOW-RS (PS3.18 10.5), and record which ones it has stored.

OUT/parts records each stored object, so that a later push sends only what is missing. Certificates of servers are
always verified; REQUESTS_CA_BUNDLE names the file of a hospital's own authority. User names, passwords and tokens
come from a file or from the environment, and appear nowhere.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

from cxr import storage
from cxr.errors import UserError
from cxr.export.dicom_parts import part_uris, read_parts
from cxr.export.dicom_write import WRITTEN, Row
from cxr.runtime.progress import Progress
from cxr.wording import counted

USER, PASSWORD, TOKEN = "CXR_PACS_USER", "CXR_PACS_PASSWORD", "CXR_PACS_TOKEN"
_BATCH_BYTES, _BATCH_OBJECTS = 32 << 20, 32  # of one request
_ATTEMPTS, _WAIT_MS = 5, 1000  # the wait doubles with each attempt
_TIMEOUT_S = 10, 300  # for connecting; for the next bytes of a response
_TEMPORARY = (
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
_REASONS = {  # Failure Reason, PS3.18 Table I.2-2 and PS3.4 Table B.2-1
    0x0110: "processing failure",
    0x0111: "it already has an object with this UID, and does not replace it",
    0x0122: "it does not accept this kind of object",
    0x0124: "it does not permit storing this object",
    0xC122: "it does not accept this transfer syntax",
}


@dataclass(frozen=True)
class Service:
    """A DICOMweb service, and how to log in to it."""

    url: str
    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)


def check_service(url: str, credentials: str, environment: Mapping[str, str] = os.environ) -> Service:
    """The service of `--push`, with the credentials from the file or the environment.

    Raises:
        UserError: the URL is not one of HTTPS, or contains more than an address; or the file lacks something.
    """
    address = urlsplit(url)
    if address.scheme not in ("https", "http") or not address.hostname:
        raise UserError(
            "expected --push with the URL of a DICOMweb service, such as https://pacs.example.org/dicomweb, got no "
            "such URL: begin it with https:// and the name of the server"
        )
    if address.username or address.password or address.query or address.fragment:
        raise UserError(
            f"expected --push with a plain URL, got one with a user, parameters or a fragment: put credentials in "
            f"{USER} and {PASSWORD}, in {TOKEN}, or in the file of --credentials"
        )
    if address.scheme == "http" and not _is_loopback(address.hostname):
        raise UserError(
            f"expected --push with https://, got http://{address.hostname}: objects contain the identity of "
            f"patients, so http:// is accepted for this machine only"
        )
    values = {"user": environment.get(USER, ""), "password": environment.get(PASSWORD, "")}
    values["token"] = environment.get(TOKEN, "")
    if credentials:
        values = _read_credentials(credentials)
    if bool(values.get("user")) != bool(values.get("password")):
        raise UserError("expected a user and a password for --push, got only one of them: set both, or a token")
    return Service(url.rstrip("/"), **{name: values.get(name, "") for name in ("user", "password", "token")})


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_credentials(uri: str) -> dict[str, str]:
    expected = f'expected a JSON object with "user" and "password", or with "token", in {uri}'
    try:
        values = json.loads(storage.read_text(storage.normalize(uri)))
    except ValueError:
        raise UserError(f'{expected}, got no JSON: write, for example, {{"token": "TOKEN"}}') from None
    if not isinstance(values, dict) or not {*values} <= {"user", "password", "token"} or not values:
        raise UserError(f"{expected}, got other keys or none: use only these keys")
    return {name: str(value) for name, value in values.items()}


def push(out: str, service: Service) -> int:
    """Send all objects of an export that the service has not stored yet; returns how many it has stored now.

    Raises:
        UserError: the service does not respond, rejects the credentials, or has not stored every object. What it has
            stored is recorded.
    """
    uris = part_uris(out)
    total = sum(len(_missing(rows, service)) for rows in read_parts(uris))
    progress, failures = Progress("sent", total, unit="objects"), Counter[str]()
    client = _client(service)
    for uri, rows in zip(uris, read_parts(uris), strict=True):
        files = _missing(rows, service)
        named = {row["file"]: row for row in rows if row["status"] == WRITTEN}
        for batch in _batches(out, files):
            reasons = _store(client, batch, service)
            for file in batch:
                named[file]["pushed"] = "" if file in reasons else service.url
                named[file]["reason"] = f"not stored: {reasons[file]}" if file in reasons else None
            failures.update(reasons.values())
            storage.write_json(uri, rows)
            progress.add(len(batch), len(reasons))
    if failures:
        listed = "; ".join(f"{counted(count, 'object')}: {reason}" for reason, count in failures.most_common(3))
        raise UserError(
            f"{service.url} has not stored {counted(failures.total(), 'object')} ({listed}): see the column "
            f"reason of export.csv, and run the same command again to send them again"
        )
    return total


def _missing(rows: Sequence[Row], service: Service) -> list[str]:
    return [row["file"] for row in rows if row["status"] == WRITTEN and row.get("pushed") != service.url]


def _client(service: Service) -> Any:
    from dicomweb_client import DICOMwebClient, session_utils

    logging.getLogger("dicomweb_client").setLevel(logging.CRITICAL)
    session = session_utils.create_session()
    if service.user:
        session = session_utils.create_session_from_user_pass(service.user, service.password)
    session.max_redirects = 0  # a redirect would send the objects to any address, also without TLS
    session.hooks["response"].append(_with_plain_content_type)
    headers = {"Authorization": f"Bearer {service.token}"} if service.token else {}
    headers |= {"Accept": "application/dicom+json"}
    # A larger message would be sent in chunks from an iterator, which is empty when the request is repeated.
    one_chunk = 2 * _BATCH_BYTES + (1 << 30)
    client = DICOMwebClient(service.url, session, headers=headers, chunk_size=one_chunk, timeout=_TIMEOUT_S)
    client.set_http_retry_params(True, _ATTEMPTS, _WAIT_MS, _TEMPORARY)
    return client


def _with_plain_content_type(response: Any, **options: Any) -> Any:
    """The response with a Content-Type that dicomweb_client recognizes: it accepts none with parameters, and needs
    one."""
    content_type = response.headers.get("Content-Type", "application/dicom+json")
    response.headers["Content-Type"] = content_type.partition(";")[0].strip().lower()
    return response


def _batches(out: str, files: Sequence[str]) -> Iterator[dict[str, bytes]]:
    """Contents of files, so many that one request is neither small nor large."""
    batch: dict[str, bytes] = {}
    for file in files:
        data = storage.read_bytes(storage.join(out, file))
        if batch and (len(batch) == _BATCH_OBJECTS or sum(map(len, batch.values())) + len(data) > _BATCH_BYTES):
            yield batch
            batch = {}
        batch[file] = data
    if batch:
        yield batch


def _store(client: Any, batch: Mapping[str, bytes], service: Service) -> dict[str, str]:
    """Send objects; returns why some were not stored, by file.

    Raises:
        UserError: the service does not respond, redirects, does not say what it has stored, or rejects the
            credentials or the address.
    """
    from pydicom import Dataset, dcmread
    from requests import HTTPError, RequestException, TooManyRedirects
    from retrying import RetryError

    objects = {file: dcmread(BytesIO(data)) for file, data in batch.items()}
    uids = {file: str(made.SOPInstanceUID) for file, made in objects.items()}
    try:
        stored, failed = _said(client.store_instances([*objects.values()]))
    except HTTPError as error:
        response = error.response
        status = response.status_code if response is not None else 500
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND):
            hint = "check the URL" if status == HTTPStatus.NOT_FOUND else f"check {USER}, {TOKEN} or --credentials"
            raise UserError(f"{service.url} responded with {status} {HTTPStatus(status).phrase}: {hint}") from None
        if len(batch) > 1 and status < 500:  # find out which object it does not accept
            reasons = [_store(client, {file: data}, service) for file, data in batch.items()]
            return {file: reason for one in reasons for file, reason in one.items()}
        if status >= 500:
            raise _unavailable(service, f"status {status}") from None
        try:
            stored, failed = _said(Dataset.from_json(response.json() if response is not None else {}))
        except Exception:  # any other text
            stored, failed = set(), {}
        return _not_stored(uids, stored, failed, f"status {status}")
    except RetryError:
        raise _unavailable(service, "it stays overloaded") from None
    except TooManyRedirects:
        raise UserError(
            f"expected {service.url} to store objects itself, got a redirect, and objects are never sent to another "
            f"address: use the final URL of the service with --push"
        ) from None
    except RequestException as error:  # its text may contain the request
        raise _unavailable(service, type(error).__name__) from None
    except (AttributeError, LookupError, SyntaxError, TypeError, ValueError):  # of the parsers of JSON and XML
        raise _unavailable(service, "its response cannot be read") from None
    if not (stored or failed):
        raise _unavailable(service, "its response does not say what it has stored")
    return _not_stored(uids, stored, failed, "the response does not mention it")


def _said(answer: Any) -> tuple[set[str], dict[str, str]]:
    """The SOP Instance UIDs of the objects that were stored, and why others were not."""
    stored = {str(item.get("ReferencedSOPInstanceUID")) for item in answer.get("ReferencedSOPSequence", ())}
    failed = {}
    for item in answer.get("FailedSOPSequence", ()):
        code = int(item.get("FailureReason") or 0)
        failed[str(item.get("ReferencedSOPInstanceUID"))] = _REASONS.get(code, f"failure reason {code:04X}")
    return stored, failed


def _not_stored(
    uids: Mapping[str, str], stored: Collection[str], failed: Mapping[str, str], unmentioned: str
) -> dict[str, str]:
    """Why objects were not stored, by file; `unmentioned` is the reason for those that are not in the response."""
    return {file: failed.get(uid, unmentioned) for file, uid in uids.items() if uid in failed or uid not in stored}


def _unavailable(service: Service, what: str) -> UserError:
    return UserError(
        f"{service.url} does not store objects at the moment ({what}): check the address, the certificate and the "
        f"service. What it has stored is recorded; run the same command again to continue"
    )
