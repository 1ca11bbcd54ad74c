"""The checksum that every checkpoint of this project carries.

It stands in the comment at the end of the zip file that torch.save writes, where torch.load and
every unzip read past it.
"""

import hashlib
import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError

# A zip file ends with a record of 22 bytes, the last two the length of the comment that follows.
_END = b"PK\x05\x06"
_END_SIZE = 22
_MARKER = b"sasa_det sha256 "
_DIGEST_SIZE = 64
_COMMENT_SIZE = len(_MARKER) + _DIGEST_SIZE


def append_sha256(path: Path) -> None:
    """Append to a file of torch.save, which has no comment, the SHA-256 of all before it."""
    with open(path, "r+b") as file:
        file.seek(-_END_SIZE, os.SEEK_END)
        end = file.read()
        if not end.startswith(_END) or end[-2:] != b"\0\0":
            raise RuntimeError(f"torch.save wrote {path} in a format that has no room for a digest")
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", _COMMENT_SIZE) + _MARKER)
        size = file.tell()
        file.seek(0)
        file.write(sha256(file, size).encode())


def check_integrity(file: BinaryIO) -> None:
    """Check a checkpoint's digest or, in a file from elsewhere, the checksums of its zip records.

    Files of formats without any checksum pass.

    Args:
        file: a file open for reading; its position changes.

    Raises:
        CheckpointError: if a byte is not as it was written, without the name of the file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _COMMENT_SIZE, 0))
    tail = file.read(_COMMENT_SIZE)
    file.seek(0)
    if tail.startswith(_MARKER):
        if sha256(file, size - _DIGEST_SIZE).encode() != tail[-_DIGEST_SIZE:]:
            raise CheckpointError("its content does not match its checksum")
    elif file.read(4) == b"PK\x03\x04":
        # No other comment is accepted, so that ours with a flipped byte does not pass for none.
        if not tail[-_END_SIZE:].startswith(_END) or tail[-2:] != b"\0\0":
            raise CheckpointError("it is truncated, or its end is damaged")
        _check_records(file, size)


def sha256(file: BinaryIO, size: int) -> str:
    """Return the SHA-256 of the next ``size`` bytes of a file in 64 hexadecimal digits."""
    digest = hashlib.sha256()
    while size > 0:
        part = file.read(min(size, 1 << 20))
        if not part:
            raise CheckpointError("it became shorter while it was read")
        digest.update(part)
        size -= len(part)
    return digest.hexdigest()


def _check_records(file: BinaryIO, size: int) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            # torch.save compresses nothing; a small file must not grow in memory.
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise CheckpointError("it has compressed records, which torch.save does not write")
            if sum(record.file_size for record in records) > size:
                raise CheckpointError("its records are larger than the file")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error) as error:
        raise CheckpointError(f"its zip structure is damaged ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"its record {damaged} does not match its checksum")
