"""Files of frozen networks, changed at random: what a loader makes of them, one after the other, in a process that has
little memory and notes what it opens.

    python -m tests.support.mutated_files SEED FIRST LAST

prints a line of JSON for each case, and one more with the bytes that they took at most; a case that ends the process is
the one after the last line.
"""

from __future__ import annotations

import copy
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

import torch

from cnnfast.engine.network import Network
from cnnfast.engine.operators import OPERATORS
from cnnfast.engine.planning import plain
from cnnfast.engine.planning.planning import plan
from cnnfast.engine.storage import file
from cnnfast.engine.storage.schemas import schema

from .frozen_networks import NETWORKS, inputs_of
from .random_calls import NUMBERS, argument

# A loader has this much memory beyond what PyTorch and the unchanged file take, in bytes, and so long, in seconds of
# the processor's: what is loaded may then run in the same memory.
MEMORY = 3 * 2**30
SECONDS = 1.0
DIGEST = '\\"digest\\":\\"'

# ----------------------------------------------------------------------------------------------------------------------
# Files, taken apart and put together


def taken_apart(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The entries of the header without the metadata, what the metadata says, and the bytes of the tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    return header, json.loads(header.pop("__metadata__")["cnnfast"]), content[end:]


def put_together(header: Any, about: Any, data: bytes, *, signed: bool = True) -> bytes:
    """The bytes of a file, with the digest that belongs to them, or the one that `about` has."""
    text = about if isinstance(about, str) else json.dumps(about, separators=(",", ":"))
    described = {"__metadata__": {"cnnfast": text}, **header} if isinstance(header, dict) else header
    raw = json.dumps(described, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    content = len(raw).to_bytes(8, "little") + raw + data
    return sign(content) if signed else content


def sign(content: bytes) -> bytes:
    """With the digest made right, where there is a place for it."""
    place = content.find(DIGEST.encode())
    if place < 0:
        return content
    place += len(DIGEST)
    digest = blake2b(content[:place] + b"0" * 64 + content[place + 64 :], digest_size=32).hexdigest()
    return content[:place] + digest.encode() + content[place + 64 :]


# ----------------------------------------------------------------------------------------------------------------------
# Changes of bytes

Change = Callable[[bytes, Random, bytes], bytes]  # of a file, with another file at hand


def flipped(content: bytes, random: Random, other: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(random.randint(1, 8)):
        changed[_place(content, random)] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwritten(content: bytes, random: Random, other: bytes) -> bytes:
    place, length = _place(content, random), random.choice((1, 8, 100, 4096))
    run = random.choice((bytes(length), b"\xff" * length, random.randbytes(length), b"[" * length, b'"' * length))
    return content[:place] + run[: len(content) - place] + content[place + length :]


def cut(content: bytes, random: Random, other: bytes) -> bytes:
    return content[: random.choice((0, 7, 8, 9, len(content) - 1, _place(content, random)))]


def extended(content: bytes, random: Random, other: bytes) -> bytes:
    return content + random.choice((b"\0", b"\0" * 4096, content, other))


def spliced(content: bytes, random: Random, other: bytes) -> bytes:
    place, there = _place(content, random), _place(other, random)
    return content[:place] + other[there : there + random.choice((8, 64, 10**6))] + content[place + 8 :]


def moved(content: bytes, random: Random, other: bytes) -> bytes:
    place, length = _place(content, random), random.randint(1, 64)
    gone = content[:place] + content[place + length :]
    there = _place(gone, random)
    return gone[:there] + content[place : place + length] + gone[there:]


def of_another_length(content: bytes, random: Random, other: bytes) -> bytes:
    length = random.choice((0, 1, 2**24, 2**24 + 1, 2**31, 2**63, 2**64 - 1, random.randrange(2 * len(content))))
    return length.to_bytes(8, "little") + content[8:]


def _place(content: bytes, random: Random) -> int:
    """Half of the time in the header."""
    end = min(len(content), 8 + int.from_bytes(content[:8], "little"))
    return random.randrange(end) if random.random() < 0.5 else random.randrange(len(content))


BYTES: tuple[Change, ...] = (flipped, overwritten, cut, extended, spliced, moved, of_another_length)

# ----------------------------------------------------------------------------------------------------------------------
# Changes of what is described

WORDS = (
    "",
    "relu",
    "tanh",
    "nothing",
    "none",
    "float32",
    "complex64",
    "a" * 5000,
    "\u0000",
    "constant",
    "aten.relu.default",
)
EVIL = (
    *("aten.from_file.default", "aten.set_.source_Storage", "aten.empty.memory_format", "aten.bernoulli.default"),
    *("aten.relu_.default", "python.eval", "python.__import__", "os.system", "builtins.exec", "cnnfast.__class__"),
    *("aten.relu", "aten", "", "cnnfast.convolution.__globals__", "prims.device_put.default", "aten.resize_.default"),
)


class Tree:
    """The places of plain data, each as a container and a key or an index in it."""

    def __init__(self, data: Any) -> None:
        self.places: list[tuple[Any, Any]] = []
        self._walk(data)

    def _walk(self, data: Any) -> None:
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            self.places.append((data, key))
            if isinstance(value, dict | list):
                self._walk(value)


def other_value(value: Any, random: Random) -> Any:
    """Of the same class, more often than not."""
    if random.random() < 0.25:
        return random.choice(
            (None, True, False, [], {}, "", 0, [value], {"value": value}, [[[[[value]]]]], {"float": "nan"})
        )
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice((*NUMBERS, value + 1, value - 1, value * 2, -value))
    if isinstance(value, str):
        return random.choice((*WORDS, value + "x", value[:-1], *OPERATORS, *EVIL))
    if isinstance(value, list):
        return random.choice((value[::-1], value + value, value[1:], value * 5000, [0] * 10**5, [value, value]))
    return {} if isinstance(value, dict) else random.choice((0, "relu", [], {"value": "x"}))


def value_changed(about: dict[str, Any], random: Random) -> None:
    holder, key = random.choice(Tree(about).places)
    holder[key] = other_value(holder[key], random)


def entry_gone(about: dict[str, Any], random: Random) -> None:
    holder, key = random.choice(Tree(about).places)
    del holder[key]


def entry_twice(about: dict[str, Any], random: Random) -> None:
    holder, key = random.choice([(h, k) for h, k in Tree(about).places if isinstance(h, list)])
    holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(holder[key]))


def entries_swapped(about: dict[str, Any], random: Random) -> None:
    places = Tree(about).places
    (h, k), (i, l) = random.choice(places), random.choice(places)
    h[k], i[l] = copy.deepcopy(i[l]), copy.deepcopy(h[k])


def entry_added(about: dict[str, Any], random: Random) -> None:
    holder = random.choice([h for h, _ in Tree(about).places if isinstance(h, dict)])
    holder[random.choice(("name", "call", "input", "constant", "value", "meta", "__class__", "x"))] = random.choice(
        WORDS
    )


def operator_changed(about: dict[str, Any], random: Random) -> None:
    _call(about, random)["call"] = random.choice((*OPERATORS, *EVIL))


def arguments_swapped(about: dict[str, Any], random: Random) -> None:
    args = _call(about, random)["args"]
    if len(args) > 1:
        i, j = random.sample(range(len(args)), 2)
        args[i], args[j] = args[j], args[i]


def number_changed(about: dict[str, Any], random: Random) -> None:
    """An argument of a call, or a size of an input or of the example."""
    roots = [node["args"] for node in about["graph"]["nodes"] if "args" in node] + [
        about["graph"]["inputs"],
        about["example"],
    ]
    places = [(h, k) for root in roots for h, k in Tree(root).places if type(h[k]) in (int, float)]
    holder, key = random.choice(places)
    holder[key] = other_value(holder[key], random)


def another_call(about: dict[str, Any], random: Random) -> None:
    """A call in the place of another, of an operator that is known, with arguments of the classes that it takes."""
    nodes = about["graph"]["nodes"]
    place = random.choice([i for i, node in enumerate(nodes) if "call" in node])
    operator = random.choice(list(OPERATORS))
    names = [node["name"] for node in nodes[:place]]

    args = [
        argument(one.real_type, random, lambda: {"value": random.choice(names)})
        for one in schema(operator).arguments
        if not one.kwarg_only
    ]
    nodes[place] = {"name": nodes[place]["name"], "call": operator, "args": args}


def _call(about: dict[str, Any], random: Random) -> dict[str, Any]:
    return random.choice([node for node in about["graph"]["nodes"] if "call" in node])


DESCRIPTION = (value_changed, entry_gone, entry_twice, entries_swapped, entry_added, operator_changed)
DESCRIPTION += (arguments_swapped, number_changed, number_changed, another_call, another_call, another_call)

# ----------------------------------------------------------------------------------------------------------------------
# Changes of tensors, as the header has them, and of its text


def tensor_changed(header: dict[str, Any], random: Random) -> None:
    entry, other = (random.choice(list(header.values())) for _ in range(2))
    what = random.choice(list(entry))
    if what == "dtype":
        entry[what] = random.choice(
            ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "x", 3)
        )
        if random.random() < 0.5:  # with a shape that fits
            size = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}.get(entry[what], 1)
            entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // size]
    elif what == "shape":
        shape = entry[what]
        turned = [
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            shape[1:],
            [-1, *shape[1:]],
            [2**62, 4, 0],
            [0, 2**63],
            [2**32] * 3,
        ]
        entry[what] = random.choice((*turned, [random.choice(NUMBERS) for _ in shape], [1] * 5000, "x", None))
    else:
        first, last = entry[what]
        entry[what] = random.choice(
            (
                [last, first],
                [first, last + 4],
                [first + 4, last],
                [0, 2**63],
                [-4, last],
                other[what],
                [first],
                "x",
                [first, 1.5],
            )
        )
    if random.random() < 0.3:
        other[what] = entry[what]


def tensor_renamed(header: dict[str, Any], random: Random) -> None:
    name = random.choice(list(header))
    entry = header.pop(name)
    if random.random() < 0.7:
        header[random.choice((*header, name + "x", "", "__metadata__", "x" * 5000))] = entry


TENSORS = (tensor_changed, tensor_changed, tensor_changed, tensor_renamed)


def text_changed(text: str, random: Random) -> str:
    """JSON that is none, or that is much longer when it is parsed."""
    place = random.randrange(len(text))
    number = random.choice(
        ("1e999", "-1e999", "9" * 5000, "NaN", "Infinity", "-Infinity", "0x10", "1" + "0" * 400, "00", "1_0")
    )
    bombs = (
        "[" * 10**5,
        "[" * 10**5 + "]" * 10**5,
        '{"a":' * 10**5,
        "[[]," * 10**5,
        " " * 10**5,
        '"name":"x",',
        number,
    )
    inserted = random.choice(bombs)
    if random.random() < 0.5:  # in the place of a number
        places = [i for i, c in enumerate(text) if c.isdigit() and text[i - 1] in "[,:" and text[i + 1] in "],}"]
        place = random.choice(places)
        return text[:place] + inserted + text[place + 1 :]
    return text[:place] + inserted + text[place:]


# ----------------------------------------------------------------------------------------------------------------------
# Cases


def case(seed: int, index: int, files: list[bytes]) -> tuple[int, str, bool, bytes]:
    """Which of the files it was, what was changed, whether the digest was made right, and the bytes."""
    random = Random(f"{seed} {index}")
    which = random.randrange(len(files))
    content, signed = files[which], index % 2 == 0
    what = random.choice(("bytes", "description", "description", "description", "tensors", "text"))
    if what == "bytes":
        change = random.choice(BYTES)
        made = change(content, random, files[which - 1])
        return which, f"bytes: {change.__name__}", signed, sign(made) if signed else made
    header, about, data = taken_apart(content)
    if what == "description":
        change = random.choice(DESCRIPTION)
        for _ in range(random.choice((1, 1, 1, 2, 5))):
            try:
                change(about, random)
            except (LookupError, TypeError, AttributeError):  # what was changed before has left nothing of that kind
                break
        name = change.__name__
    elif what == "tensors":
        change = random.choice(TENSORS)
        change(header, random)
        name = change.__name__
    else:
        about = text_changed(json.dumps(about, separators=(",", ":")), random)
        name = "text_changed"
    return which, f"{what}: {name}", signed, put_together(header, about, data, signed=signed)


def judged(path: Path, original: Network, expected: tuple[Any, ...], signed: bool, changed: bool) -> str:
    """What came of a file: "refused", "equal", "other values", "refused by a kernel, when it was run". Raises
    AssertionError for whatever else there is: another exception, a message without the file's name, a damaged file that
    was read.
    """
    began = time.process_time()
    try:
        network = file.read(path)
    except ValueError as error:
        if str(path) not in str(error) or "cannot be understood" in str(error):
            raise AssertionError(f"the message does not name the file, or what is wrong with it: {error}") from error
        return "refused"
    finally:
        seconds = time.process_time() - began
        assert seconds < SECONDS, f"{seconds:.1f} s"
    inputs = inputs_of(network)
    try:
        results = plain.run(plan(network.graph, network.example), network.graph.constants, inputs)
    except (ValueError, IndexError, NotImplementedError, RuntimeError) as error:
        if "memory" in str(error):
            raise
        return "refused by a kernel, when it was run"
    same = len(results) == len(expected) and all(map(torch.equal, results, expected))
    assert signed or not changed, "a damaged file was read"
    return "equal" if same else "other values"


TOUCHED: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event.split(".")[0] in (
        "open",
        "socket",
        "import",
        "exec",
        "compile",
        "subprocess",
        "os",
        "shutil",
        "ctypes",
        "pickle",
    ):
        TOUCHED.append(f"{event} {arguments[:1]!r:.200}")


def main(seed: int, first: int, last: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.cnnfast"
        networks = [make() for make in NETWORKS.values()]
        files = []
        for network in networks:
            file.write(network, path)
            files.append(path.read_bytes())
            file.read(path)  # so that what PyTorch imports when it first needs it is there
        for name in OPERATORS:
            schema(name)
        expected = [network.graph.run(inputs_of(network)) for network in networks]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sys.addaudithook(_note)
        for index in range(first, last):
            which, what, signed, content = case(seed, index, files)
            path.write_bytes(content)
            TOUCHED.clear()
            try:
                outcome = judged(path, networks[which], expected[which], signed, content != files[which])
                others = [one for one in TOUCHED if not (one.startswith("open") and path.name in one)]
                assert not others, f"{others}"
            except BaseException as error:
                outcome = f"FAILED: {type(error).__name__}: {error}"
            print(json.dumps({"index": index, "what": what, "signed": signed, "outcome": outcome}), flush=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps({"peak": peak * 1024}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
