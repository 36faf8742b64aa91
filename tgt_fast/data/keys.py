"""Sample ids of samples that have names: the keys of WebDataset's shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from tgt_fast.errors import ArgumentError

_OP: Final = "key_to_id"
_ID_BYTES: Final = 6  # ids are below 2**48
_REMEDY: Final = "give one of the two another key, or take ids of your own for the data set"

# Of the ids that this process has made, 64 other bits of what they were made from.
_seen: dict[int, int] = {}


def key_to_id(url: str, key: str, *, check: bool = True) -> int:
    """The sample id of a sample of WebDataset, whose ``__key__`` is unique only together with its ``__url__``.

    48 bits of a BLAKE2b hash of both: the same in every process, on every machine, with every version of this package.
    Of n samples two have one id with a probability of about n^2 / 2^49: 0.2 % for a million, a sixth for ten million.
    So each process remembers the ids that it has made (some 150 bytes each) and refuses a second name for one;
    :func:`check_keys` looks at a whole data set, whose samples several workers read.

    Args:
        url: of the shard, as the data set has it. Where shards may move, pass what stays: ``url.rsplit("/", 1)[-1]``.
        key: of the sample.
        check: whether to remember, and to look.

    Raises:
        ArgumentError: another sample has this id; or something else than two strings.

    >>> import tgt_fast as tgt
    >>> tgt.data.key_to_id("shard-000000.tar", "0001")
    196825416107478
    """
    number, rest = _hashed(url, key)
    if check and _seen.setdefault(number, rest) != rest:
        raise ArgumentError(f"{_OP}: {url!r}, {key!r} has the id {number} of another sample: {_REMEDY}")
    return number


def check_keys(names: Iterable[tuple[str, str]]) -> int:
    """Check that no two of these (url, key) pairs have one id; how many samples there are, of pairs that repeat one.

    Raises:
        ArgumentError: two have, with their names.
    """
    found: dict[int, tuple[int, tuple[str, str]]] = {}
    for url, key in names:
        number, rest = _hashed(url, key)
        known, name = found.setdefault(number, (rest, (url, key)))
        if known != rest:
            raise ArgumentError(f"{_OP}: {name!r} and {(url, key)!r} both have the id {number}: {_REMEDY}")
    return len(found)


def _hashed(url: str, key: str) -> tuple[int, int]:
    for name, value in (("url", url), ("key", key)):
        if not isinstance(value, str):
            raise ArgumentError(f"{_OP}: {name} must be a string, got {value!r:.200}")
    words = [text.encode("utf-8", "surrogatepass") for text in (url, key)]
    digest = hashlib.blake2b(len(words[0]).to_bytes(8, "little") + words[0] + words[1], digest_size=14).digest()
    return int.from_bytes(digest[:_ID_BYTES], "little"), int.from_bytes(digest[_ID_BYTES:], "little")
