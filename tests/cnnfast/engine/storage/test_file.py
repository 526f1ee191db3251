"""Files of frozen networks: what is written is read, and whatever is not what was written is refused, by a ValueError
that names the file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import cnnfast_kernels
from cnnfast.engine.graph import Graph
from cnnfast.engine.network import Network
from cnnfast.engine.planning import plain
from cnnfast.engine.planning.planning import plan
from cnnfast.engine.storage import file
from cnnfast.engine.storage.container import LARGEST_HEADER
from tests.support.child import REPOSITORY, environment
from tests.support.frozen_networks import NETWORKS, inputs_of, network_of_every_argument, residual_network
from tests.support.mutated_files import put_together, taken_apart


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.cnnfast"


def written(network: Network, path) -> bytes:
    file.write(network, path)
    return path.read_bytes()


def run(network: Network) -> tuple[torch.Tensor, ...]:
    return plain.run(plan(network.graph, network.example), network.graph.constants, inputs_of(network))


def nodes(graph: Graph) -> list[tuple]:
    """Names, what is called with what, and what is said of it."""
    return [(n.name, n.op, n.target, str(n.args), str(n.kwargs), n.meta) for n in graph.calls.nodes if n.op[:2] != "pl"]


# ----------------------------------------------------------------------------------------------------------------------
# What is written is read


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_written_is_read(name, path):
    network = NETWORKS[name]()
    file.write(network, path)
    read = file.read(path)
    for mine, other in zip(run(read), run(network), strict=True):
        assert torch.equal(mine, other)
        assert mine.dtype == other.dtype
    assert replace(read, graph=network.graph) == network
    assert nodes(read.graph) == nodes(network.graph)
    assert (read.graph.inputs, read.graph.conditions) == (network.graph.inputs, network.graph.conditions)
    assert read.graph.constants.keys() == network.graph.constants.keys()
    for constant, value in network.graph.constants.items():
        assert torch.equal(read.graph.constants[constant], value)
        assert read.graph.constants[constant].dtype == value.dtype
    assert [n.name for n in read.graph.calls.find_nodes(op="placeholder")] == [
        n.name for n in network.graph.calls.find_nodes(op="placeholder")
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_network_gives_the_same_bytes(name, path):
    content = written(NETWORKS[name](), path)
    assert written(NETWORKS[name](), path) == content
    assert written(file.read(path), path) == content


def test_another_process_writes_the_same_bytes(path):
    """In which sets of strings have another order."""
    script = (
        "import sys; from cnnfast.engine.storage import file; "
        "from tests.support.frozen_networks import residual_network; file.write(residual_network(), sys.argv[1])"
    )
    content = written(residual_network(), path)
    path.unlink()
    subprocess.run([sys.executable, "-c", script, str(path)], env=environment(), cwd=REPOSITORY, check=True)
    assert path.read_bytes() == content


def test_safetensors_reads_the_weights(path):
    network = residual_network()
    file.write(network, path)
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == set(network.graph.constants)
        assert json.loads(opened.metadata()["cnnfast"])["written_by"] == {
            "cnnfast": cnnfast_kernels.__version__,
            "torch": torch.__version__,
        }
    loaded = safetensors.torch.load_file(path)
    assert all(torch.equal(loaded[name], value) for name, value in network.graph.constants.items())


def test_a_tied_constant_is_there_once(path):
    network = network_of_every_argument()
    assert network.graph.constants["other_name"] is network.graph.constants["shift"]
    file.write(network, path)
    assert "other_name" not in safetensors.torch.load_file(path)
    read = file.read(path)
    assert read.graph.constants["other_name"] is read.graph.constants["shift"]


def test_constants_may_share_memory_and_have_any_strides(path):
    """Views that overlap, a transposed one, a slice, one that is expanded, and one in channels_last."""
    network = residual_network()
    whole = torch.arange(10 * 8 * 9.0)
    constants = network.graph.constants
    constants["inner.weight"] = whole[: 8 * 72].reshape(8, 8, 3, 3)
    constants["block.weight"] = whole[72 : 9 * 72].reshape(8, 8, 3, 3).transpose(2, 3)
    constants["inner.bias"], constants["block.bias"] = whole[:16:2], torch.ones(1).expand(8)
    constants["stem.weight"] = constants["stem.weight"].to(memory_format=torch.channels_last)
    constants["stem.bias"] = torch.nn.Parameter(whole[1:9])
    expected = {name: value.detach().clone() for name, value in constants.items()}
    file.write(network, path)
    read = file.read(path).graph.constants
    assert all(torch.equal(read[name], value) for name, value in expected.items())
    assert not any(value.requires_grad for value in read.values())


def test_a_file_that_is_overwritten_in_place_changes_no_loaded_network(path):
    file.write(residual_network(), path)
    read = file.read(path)
    expected = run(read)
    with path.open("r+b") as opened:
        opened.write(bytes(path.stat().st_size))
        opened.truncate(100)
    assert torch.equal(run(read)[0], expected[0])


def test_entries_that_a_later_cnnfast_adds_are_left_alone(path):
    header, about, data = taken_apart(written(residual_network(), path))
    path.write_bytes(put_together(header, {**about, "licence": "MIT"}, data))
    assert torch.equal(run(file.read(path))[0], run(residual_network())[0])


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be written


def test_what_could_not_be_read_is_not_written(path):
    network = residual_network()
    with pytest.raises(
        ValueError,
        match=r"network\.cnnfast cannot be written: there are 2 classes, and the first result has the shape .1, 5.",
    ):
        file.write(replace(network, classes=("cat", "dog")), path)
    node = next(n for n in network.graph.calls.nodes if n.name == "mean_dim" or "mean" in n.name)
    node.target = torch.ops.aten.relu_.default
    with pytest.raises(ValueError, match=r"network\.cnnfast cannot be written: .* calls aten.relu_"):
        file.write(network, path)
    assert not path.exists()


def test_a_description_that_is_too_long_is_not_written(path, monkeypatch):
    monkeypatch.setattr("cnnfast.engine.storage.container.LARGEST_HEADER", 1000)
    with pytest.raises(ValueError, match=r"cannot be written: its description takes .* the most .* is 1,000"):
        file.write(residual_network(), path)


# ----------------------------------------------------------------------------------------------------------------------
# What is no file of a frozen network


def refused(path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        file.read(path)
    assert str(raised.value).startswith(str(path))


def test_a_file_that_is_missing_or_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.cnnfast"):
        file.read(tmp_path / "nothing.cnnfast")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        file.read(tmp_path)


def test_a_device_is_not_read():
    with pytest.raises(ValueError, match="/dev/zero is not a regular file"):
        file.read("/dev/zero")


def test_files_of_others(path, tmp_path):
    torch.save({"weight": torch.zeros(3)}, path)
    foreign = {"torch.save": path.read_bytes(), "nothing": b"", "eight bytes": bytes(8), "text": b"import os\n" * 100}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.json", "{}")
    foreign["zip"] = path.read_bytes()
    foreign["onnx"] = b"\x08\x08\x12\x07pytorch" + bytes(1000)
    foreign["gguf"] = b"GGUF\x03\0\0\0" + bytes(1000)
    foreign["json of a number"] = (1).to_bytes(8, "little") + b"1"
    foreign["json of a list"] = (2).to_bytes(8, "little") + b"[]"
    for content in foreign.values():
        refused(path, content, "is not a safetensors file")


def test_safetensors_files_of_others(path):
    for metadata in (None, {"format": "pt"}, {"cnnfast": "{}"}, {"cnnfast": '{"format": "other"}'}, {"cnnfast": "[]"}):
        content = safetensors.torch.save({"weight": torch.zeros(3)}, metadata=metadata)
        refused(path, content, "is a safetensors file, but not of a frozen network")


def test_a_header_that_is_too_long(path):
    refused(
        path, (LARGEST_HEADER + 1).to_bytes(8, "little") + b" " * (LARGEST_HEADER + 1), "header of 16,777,217 bytes"
    )
    refused(path, (2**63).to_bytes(8, "little") + b"{}", "is not a safetensors file, or is cut off")


def test_a_newer_format_says_who_wrote_it_and_what_to_do(path):
    header, about, data = taken_apart(written(residual_network(), path))
    about |= {"version": 3, "written_by": {"cnnfast": "9.1"}, "digest": "of another kind"}
    message = r"was written by cnnfast 9\.1, in format 3; this cnnfast, .*, reads formats up to 1: upgrade cnnfast"
    refused(path, put_together(header, about, data, signed=False), message)
    about |= {"version": 0}
    refused(path, put_together(header, about, data, signed=False), "is in format 0, which there is not")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_byte_is_under_the_digest(name, path):
    """Flipped bits and missing ends, all through the file."""
    content = written(NETWORKS[name](), path)
    for place in (*range(0, len(content), 97), len(content) - 1):
        refused(path, content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :], ".")
        refused(path, content[:place], "is not a safetensors file|is cut off: its last [0-9,]+ bytes are missing")
    refused(path, content + b"\0", "is damaged: its content is not what its digest says")


def test_a_file_that_is_written_to_while_it_is_read(path, monkeypatch):
    """As whole as it is, it is not the one that was begun with."""
    content, other = (written(residual_network(seed), path) for seed in (1, 2))
    assert len(content) == len(other)
    monkeypatch.setattr(file, "_check_version", lambda about: path.write_bytes(content))
    with pytest.raises(ValueError, match="is damaged: its content is not what its digest says"):
        file.read(path)


# ----------------------------------------------------------------------------------------------------------------------
# Files that somebody has made, whose digest is right


def tensors_changed(header, **changes):
    name = "stem.bias"
    return {**header, name: header[name] | changes}


TENSORS = {
    "overlap": lambda h: tensors_changed(
        h, data_offsets=h["stem.weight"]["data_offsets"], shape=h["stem.weight"]["shape"]
    ),
    "a hole": lambda h: {n: e for n, e in h.items() if n != "stem.bias"},
    "beyond the end": lambda h: tensors_changed(h, data_offsets=[0, 2**40], shape=[2**38]),
    "another size": lambda h: tensors_changed(h, shape=[2**40]),
    "a product beyond 64 bits": lambda h: tensors_changed(h, shape=[2**32, 2**32, 0]),
    "more than an integer": lambda h: tensors_changed(h, shape=[2**70]),
    "negative": lambda h: tensors_changed(h, shape=[-8]),
    "backwards": lambda h: tensors_changed(h, data_offsets=h["stem.bias"]["data_offsets"][::-1]),
    "no such dtype": lambda h: tensors_changed(h, dtype="F31"),
    "complex": lambda h: tensors_changed(h, dtype="C64", shape=[4]),
    "eight bits": lambda h: tensors_changed(h, dtype="F8_E4M3", shape=[32]),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_not_where_the_header_says(what, path):
    header, about, data = taken_apart(written(residual_network(), path))
    refused(path, put_together(TENSORS[what](header), about, data), ".")


def test_constants_that_do_not_belong_to_their_operator(path):
    header, about, data = taken_apart(written(residual_network(), path))
    for change, message in (
        ({"dtype": "I32"}, "takes tensors of one floating dtype, and gets torch.float32, torch.int32"),
        ({"dtype": "F16", "shape": [16]}, "takes tensors of one floating dtype"),
        ({"shape": [4, 2]}, r"8 filters have a bias of shape \[4, 2\]"),
    ):
        refused(path, put_together(tensors_changed(header, **change), about, data), message)


ABOUT = {
    "no graph": (lambda a: a.pop("graph"), "'graph' is missing"),
    "more inputs": (lambda a: a["graph"]["inputs"].append(a["graph"]["inputs"][0]), "1 nodes take an input.* 2 inputs"),
    "an example of another rank": (
        lambda a: a.update(example=[[1, 3, 8]]),
        r"takes \[any, 3, any, any\], got \(1, 3, 8\)",
    ),
    "an example of another size": (lambda a: a.update(example=[[1, 4, 8, 8]]), r"takes \[any, 3, any, any\]"),
    "a huge example": (lambda a: a.update(example=[[2**31 - 1, 3, 2**20, 2**20]]), "too large a declared size"),
    "an example beyond all sizes": (lambda a: a.update(example=[[2**62, 3, 8, 8]]), "4611686018427387904 is no size"),
    "a condition that the example breaks": (
        lambda a: a["graph"].update(conditions=["size(0, 2) >= 9"]),
        "do not satisfy",
    ),
    "a condition that is Python": (lambda a: a["graph"].update(conditions=["__import__('os')"]), "."),
    "a condition on nothing": (lambda a: a["graph"].update(conditions=["size(3, 2) >= 1"]), "which no input has"),
    "arguments of two": (
        lambda a: a.update(arguments=a["arguments"] | {"parts": [{"kind": "tensor"}] * 2}),
        "takes 1 inp",
    ),
    "a result of two": (
        lambda a: a.update(result={"kind": "tuple", "parts": [{"kind": "tensor"}] * 2}),
        "there are 1 results",
    ),
    "no such kind": (lambda a: a.update(result={"kind": "module"}), "damaged"),
    "two dtypes": (lambda a: a["result_dtypes"].append("float32"), "1 results, of 2 dtypes"),
    "no such dtype": (lambda a: a.update(dtype="float31"), "'float31' is no dtype"),
    "classes": (lambda a: a["classes"].pop(), "there are 4 classes"),
    "numbers for classes": (lambda a: a.update(classes=[1, 2, 3, 4, 5]), "is no list of names of classes"),
    "no interpolation": (lambda a: a["preprocessing"].update(interpolation="__class__"), "interpolation"),
    "preprocessing of strings": (lambda a: a["preprocessing"].update(mean="abc"), "mean"),
    "a reason that is none": (lambda a: a.update(fixed=1), "'fixed' is 1, and no str"),
    "the same as nothing": (lambda a: a["same"].update(x="y"), "'x' is said to be the same as 'y'"),
    "the same as itself": (lambda a: a["same"].update({"stem.bias": "stem.bias"}), "is said to be the same"),
    "deep structure": (lambda a: a.update(result=nested({"kind": "tensor"}, 200)), "damaged"),
}


def nested(data, depth: int):
    for _ in range(depth):
        data = {"kind": "tuple", "parts": [data]}
    return data


@pytest.mark.parametrize("what", ABOUT)
def test_descriptions_of_what_is_no_network(what, path):
    header, about, data = taken_apart(written(residual_network(), path))
    change, message = ABOUT[what]
    change(about)
    refused(path, put_together(header, about, data), message)


TEXTS = {
    "a name twice": lambda text: text.replace('"dtype":', '"dtype":"float32","dtype":', 1),
    "lists in lists": lambda text: text.replace('"conditions":[', '"conditions":[' + "[" * 10**5, 1),
    "closed lists in lists": lambda text: text.replace(
        '"conditions":[', f'"conditions":[{"[" * 10**5}{"]" * 10**5},', 1
    ),
    "mappings in mappings": lambda text: text.replace(
        '"fixed":""', '"fixed":' + '{"a":' * 10**5 + "1" + "}" * 10**5, 1
    ),
    "NaN": lambda text: text.replace('"example":[[1', '"example":[[NaN', 1),
    "Infinity": lambda text: text.replace('"example":[[1', '"example":[[-Infinity', 1),
    "a float that is infinite": lambda text: text.replace('"example":[[1', '"example":[[1e999', 1),
    "ten thousand digits": lambda text: text.replace('"example":[[1', f'"example":[[{"1" * 10**4}', 1),
    "no end": lambda text: text[:-1],
    "more behind the end": lambda text: text + "1",
    "nothing": lambda text: "",
}


@pytest.mark.parametrize("what", TEXTS)
def test_texts_that_are_not_what_json_dumps_writes(what, path):
    header, about, data = taken_apart(written(residual_network(), path))
    text = json.dumps(about, separators=(",", ":"))
    changed = TEXTS[what](text)
    assert changed != text
    refused(path, put_together(header, changed, data), ".")


def test_a_hundred_mutated_files():
    """The first of those of ci/mutated_files.py, in a process of their own."""
    command = [sys.executable, "-m", "tests.support.mutated_files", "0", "0", "100"]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *cases, last = map(json.loads, done.stdout.splitlines())
    assert last["peak"] < 2**28
    assert len(cases) == 100
    assert [case for case in cases if case["outcome"].startswith("FAILED")] == []
    assert {case["outcome"] for case in cases} >= {"refused", "equal", "other values"}
