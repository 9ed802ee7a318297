"""One record of the disk cache as bytes: a page or a state of a prompt, with everything needed to recognise it.

All numbers unsigned and little-endian:

    bytes 0-7      "lrprefix"
          8-11     format version, 1
          12-15    t, length of the tenant          16-19   m, length of the meta
          20-27    p, length of the payload
          28-39    kind, ASCII padded with zeros
          40-71    blake2b-256 digest of "longreach prefix record 1" + newline + the engine's fingerprint
          72-103   key
          104-     tenant (t bytes of UTF-8), meta (m bytes of JSON), payload (p bytes), and
                   SHA-256 of everything before it (32 bytes)

A record's folder is the first 16 bytes of that digest, its name (20 bytes) the blake2b-160 digest of folder, key, padded
kind and tenant.

SHA-256, as it is the fastest of hashlib's digests on processors with instructions for it (75 KiB: 43 µs; blake2b: 82 µs).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("page", "state")
KEY_NBYTES, FOLDER_NBYTES, NAME_NBYTES = 32, 16, 20

_MAGIC = b"lrprefix"
_FORMAT_VERSION = 1
_CHECKSUM_NBYTES = 32
_HEADER = struct.Struct("<8sIIIQ12s32s32s")

Bytes = bytes | bytearray | memoryview
Payload = Bytes | Sequence[Bytes]


@dataclass(frozen=True)
class DiskRecord:
    """What was put: `payload` as one piece, `meta` as JSON gives it back."""

    kind: str
    payload: bytes
    meta: dict[str, Any]


class DamagedRecord(Exception):
    """What is wrong with a record, in words."""


def fingerprint_digest(fingerprint: str) -> bytes:
    """The 32 bytes by which a record names the engine that wrote it."""
    named = f"longreach prefix record {_FORMAT_VERSION}\n{fingerprint}"
    return hashlib.blake2b(encoded(named), digest_size=32).digest()


def encoded(text: str) -> bytes:
    """UTF-8 of any text, lone surrogates included: a tenant may be named by what was no text."""
    return text.encode("utf-8", "surrogatepass")


def record_name(folder: bytes, tenant: str, key: bytes, kind: str) -> bytes:
    """The 20 bytes that name the record of these four."""
    assert len(key) == KEY_NBYTES, f"a key has {KEY_NBYTES} bytes, not {len(key)}"
    assert kind in KINDS, f"kind {kind!r} is none of {KINDS}"
    return hashlib.blake2b(folder + key + _padded(kind) + encoded(tenant), digest_size=NAME_NBYTES).digest()


def flat_views(payload: Payload) -> list[memoryview]:
    """The payload as flat views of its bytes, in order, without copying."""
    parts = [payload] if isinstance(payload, Bytes) else payload
    return [view.cast("B") for view in map(memoryview, parts) if view.nbytes]


def pack(
    fingerprint: bytes, tenant: str, key: bytes, kind: str, payload: Payload, meta: dict[str, Any] | None
) -> list[Bytes]:
    """The record as flat pieces to be written one after another; the payload is not copied.

    Args:
        fingerprint: its digest.
        meta: what JSON can hold.
    """
    who, parts = encoded(tenant), flat_views(payload)
    meta_json = json.dumps(meta, separators=(",", ":")).encode() if meta else b""
    lengths = len(who), len(meta_json), sum(map(len, parts))
    header = _HEADER.pack(_MAGIC, _FORMAT_VERSION, *lengths, _padded(kind), fingerprint, key)
    pieces = [header + who + meta_json, *parts]
    return [*pieces, _checksum(pieces)]


def unpack(record: bytes, fingerprint: bytes, tenant: str, key: bytes, kind: str) -> DiskRecord:
    """The record in the bytes of a file.

    Raises:
        DamagedRecord: they are not whole, or not the record asked for.
    """
    if len(record) < _HEADER.size + _CHECKSUM_NBYTES:
        raise DamagedRecord(f"it ends after {len(record)} bytes, before its header does")
    magic, version, tenant_nbytes, meta_nbytes, payload_nbytes, *identity = _HEADER.unpack_from(record)
    if magic != _MAGIC:
        raise DamagedRecord("it does not begin like a record")
    meta_at = _HEADER.size + tenant_nbytes
    payload_at = meta_at + meta_nbytes
    nbytes = payload_at + payload_nbytes + _CHECKSUM_NBYTES
    if len(record) != nbytes:
        raise DamagedRecord(f"it has {len(record)} bytes where its header says {nbytes}")
    if _checksum([memoryview(record)[:-_CHECKSUM_NBYTES]]) != record[-_CHECKSUM_NBYTES:]:
        raise DamagedRecord("its checksum does not fit its contents")
    if version != _FORMAT_VERSION:
        raise DamagedRecord(f"it has format version {version} where {_FORMAT_VERSION} belongs")
    if [*identity, record[_HEADER.size : meta_at]] != [_padded(kind), fingerprint, key, encoded(tenant)]:
        raise DamagedRecord("it is the record of another engine, tenant, kind or key")
    try:
        meta = json.loads(record[meta_at:payload_at]) if meta_nbytes else {}
    except ValueError:
        raise DamagedRecord("its meta is not JSON") from None
    return DiskRecord(kind, record[payload_at:-_CHECKSUM_NBYTES], meta)


def _padded(kind: str) -> bytes:
    return kind.encode("ascii").ljust(12, b"\0")


def _checksum(pieces: Iterable[Bytes]) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()
