"""Keyed pseudonyms of patients: HMAC-SHA256 of the ids in DICOM headers."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field

from cxr import storage
from cxr.errors import UserError

KEY_VARIABLE = "CXR_ID_KEY"
KEY_FILE = "id_key.txt"  # in the folder of headers
_LEAST_BYTES = 16
ID_CHARS = 32  # hexadecimal digits of a pseudonym: 128 bits


@dataclass(frozen=True)
class Pseudonyms:
    """How ids of patients are stored.

    Args:
        key: secret; the same id has the same pseudonym only under the same key.
        keep_ids: store the ids themselves.
    """

    key: bytes = field(repr=False)
    keep_ids: bool = False

    def of(self, kind: str, value: bytes | None) -> str | None:
        """What is stored for an id of this kind (the DICOM keyword); None remains None."""
        if value is None:
            return None
        if self.keep_ids:
            return value.decode("utf-8", "backslashreplace")  # keeps different ids different
        return hmac.digest(self.key, kind.encode() + b"\0" + value, "sha256").hex()[:ID_CHARS]

    def describe(self) -> dict[str, str | bool]:
        """What stored ids depend on, without revealing the key."""
        return {"key": hmac.digest(self.key, b"name of the key", "sha256").hex()[:16], "keep_ids": self.keep_ids}


def open_pseudonyms(id_key: str, keep_ids: bool, folder: str) -> Pseudonyms:
    """Use the key in file `id_key`, in CXR_ID_KEY or in `folder`, in this order; else generate one in `folder`.

    Args:
        folder: URI of the folder of headers. Empty: a generated key is not stored.

    Raises:
        UserError: the file or variable has fewer than 16 bytes.
        StorageError: the file cannot be read or written.
    """
    if id_key:
        return Pseudonyms(read_key(id_key, f"--id-key {id_key}"), keep_ids)
    if os.environ.get(KEY_VARIABLE):
        return Pseudonyms(_checked(os.environ[KEY_VARIABLE].encode(), KEY_VARIABLE), keep_ids)
    if not folder:
        return Pseudonyms(secrets.token_bytes(32), keep_ids)
    uri = storage.join(folder, KEY_FILE)
    if not storage.exists(uri):
        storage.replace_if(uri, secrets.token_hex(32).encode(), None, private=True)  # unless another process did
    return Pseudonyms(read_key(uri, uri), keep_ids)


def read_key(uri: str, where: str) -> bytes:
    """The secret key in a file.

    Args:
        where: what messages call the file.

    Raises:
        UserError: the file has fewer than 16 bytes.
        StorageError: it cannot be read.
    """
    return _checked(storage.read_bytes(storage.normalize(uri)), where)


def patient_byte(value: bytes) -> int:
    """8 bits of an unkeyed hash of an id, which decide the patient's split and identify nobody.

    They are the same under every key, so that a person is in the same split in every run.
    """
    return hashlib.blake2b(b"split\0" + value, digest_size=1).digest()[0]


def _checked(content: bytes, where: str) -> bytes:
    key = content.strip()
    if len(key) < _LEAST_BYTES:
        raise UserError(
            f"expected a key of at least {_LEAST_BYTES} bytes in {where}, got {len(key)}: write one, for example "
            f"with openssl rand -hex 32"
        )
    return key
