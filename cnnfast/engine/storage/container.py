"""A safetensors file that holds tensors and a text, with a digest of all that is in it.

The text is JSON, an object, and is the only entry of the file's metadata: safetensors keeps entries in no order, and
the same content shall give the same bytes. It begins with the digest, whose own place counts as zeros. The digest tells
an accident, a transfer that broke or a disk that failed; against somebody who makes a file on purpose it is no help.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

ENTRY = "cnnfast"
DIGITS = 64
EMPTY_DIGEST = "0" * DIGITS
# Bytes: hundreds of times what the largest networks need, and little enough to be parsed in a second.
LARGEST_HEADER = 2**24
PREFIX = 8  # The length of the header, little-endian, is what a safetensors file begins with.


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytearray:
    """The bytes of a file. tensors: contiguous, each with memory of its own. about: plain data for JSON.

    Raises ValueError where `about` holds what JSON does not have (NaN, infinities, other classes), or is too large.
    """
    text = json.dumps({"digest": EMPTY_DIGEST, **about}, separators=(",", ":"), allow_nan=False)
    content = bytearray(safetensors.torch.save(dict(tensors), metadata={ENTRY: text}))
    end = PREFIX + int.from_bytes(content[:PREFIX], "little")
    if end > PREFIX + LARGEST_HEADER:
        raise ValueError(f"its description takes {end:,} bytes, and the most that can be read is {LARGEST_HEADER:,}")
    place = content.find(f'\\"digest\\":\\"{EMPTY_DIGEST}'.encode(), 0, end)
    place = content.index(EMPTY_DIGEST.encode(), place)
    content[place : place + DIGITS] = _digest(content, place).encode()
    return content


def unpack(path: Path, check: Callable[[dict[str, Any]], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, with memory of their own, and what was said about them.

    check: is called with the latter before anything else is read, and may raise. Raises ValueError, in words that
    follow the file's name, where the file is none that `pack` made, or is not as `pack` made it; OSError as open does.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError("is not a regular file")
    with path.open("rb") as file:
        header = _header(file.read(PREFIX), file, path.stat().st_size)
        described = _json(header, "is not a safetensors file")
        about = _about(described)
        check(about)
        missing = PREFIX + len(header) + _data_bytes(described) - path.stat().st_size
        if missing > 0:
            raise ValueError(f"is cut off: its last {missing:,} bytes are missing")
        file.seek(0)
        content = file.read()
    given = str(about.get("digest"))
    place = content.find(given.encode(), 0, PREFIX + len(header))
    if len(given) != DIGITS or place < 0 or _digest(content, place) != given:
        raise ValueError("is damaged: its content is not what its digest says")
    try:
        return safetensors.torch.load(content), about
    except Exception as error:  # SafetensorError, and what PyTorch says of sizes that no tensor can have
        raise ValueError(f"has tensors that cannot be read: {error}") from None


def _digest(content: bytes | bytearray, place: int) -> str:
    """Of all bytes, with zeros where the digest stands."""
    view = memoryview(content)
    made = blake2b(view[:place], digest_size=DIGITS // 2)
    made.update(EMPTY_DIGEST.encode())
    made.update(view[place + DIGITS :])
    return made.hexdigest()


def _header(prefix: bytes, file: Any, size: int) -> bytes:
    length = int.from_bytes(prefix, "little")
    if size <= PREFIX or length > size - PREFIX:
        raise ValueError("is not a safetensors file, or is cut off")
    if length > LARGEST_HEADER:
        raise ValueError(f"has a header of {length:,} bytes, and the largest that is read has {LARGEST_HEADER:,}")
    return file.read(length)


def _json(text: bytes | str, otherwise: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        raise ValueError(otherwise) from None


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _about(described: Any) -> dict[str, Any]:
    if not isinstance(described, dict):
        raise ValueError("is not a safetensors file")
    metadata = described.get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(ENTRY), str):
        raise ValueError("is a safetensors file, but not of a frozen network")
    about = _json(metadata[ENTRY], "is damaged: the description of its network is not JSON")
    if not isinstance(about, dict):
        raise ValueError("is a safetensors file, but not of a frozen network")
    return about


def _data_bytes(described: dict[str, Any]) -> int:
    """How many bytes the header says that follow it."""
    try:
        return max((entry["data_offsets"][1] for name, entry in described.items() if name != "__metadata__"), default=0)
    except (TypeError, KeyError, IndexError):
        raise ValueError("is damaged: its header does not say where its tensors lie") from None
