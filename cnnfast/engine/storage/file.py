"""The file of a frozen network: one safetensors file, with the weights, and all else as JSON beside them.

It is read without the model's code, and nothing in it is run: it names operators, all of which are in operators.py.

A version stands for what the words of the file mean. A reader refuses a version above its own, for it would compute
something else; within a version entries may come that tell more of a network, and a reader that does not know them
leaves them alone. A node says nothing that its reader does not know.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnfast_kernels import __version__

from ..images.preprocessing import Preprocessing
from ..network import Network
from ..planning.conditions import check
from ..planning.planning import plan
from ..structures import Structure
from . import container, graph_json
from .graph_json import DTYPE_NAMES, dtype, dtype_name, size
from .plain_data import field, shortened, strings
from .replacing import replace
from .schemas import LARGEST_NUMBER

FORMAT = "cnnfast frozen network"
VERSION = 1


def write(network: Network, path: str | Path) -> None:
    """The same network gives the same bytes. Whoever reads meanwhile, or after this process was killed, finds the file
    that was there or the new one.

    Raises ValueError where the graph has what files do not have; OSError, which names the path and says what is wrong,
    where it cannot be written.
    """
    path = Path(path)
    tensors, same = _apart(network.graph.constants)
    try:
        about = {
            "format": FORMAT,
            "version": VERSION,
            "written_by": {"cnnfast": __version__, "torch": torch.__version__},
            "graph": graph_json.to_data(network.graph),
            "same": same,
            "arguments": network.arguments.to_json(),
            "result": network.result.to_json(),
            "dtype": dtype_name(network.dtype),
            "result_dtypes": [dtype_name(one) for one in network.result_dtypes],
            "example": [list(shape) for shape in network.example],
            "fixed": network.fixed,
            "preprocessing": network.preprocessing.to_json() if network.preprocessing else None,
            "classes": list(network.classes) if network.classes is not None else None,
        }
        _network(dict(tensors), about)  # what is written can be read: it is refused here, and not where it is deployed
        content = container.pack(tensors, about)
    except ValueError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    replace(path, content)


def read(path: str | Path) -> Network:
    """The network that `write` wrote. Its tensors have memory of their own: the file may change afterwards.

    Raises ValueError, which names the file and says what is wrong, for a file that is foreign, cut off, damaged, of a
    newer version, or describes what no network is; FileNotFoundError and other OSErrors as open does.
    """
    path = Path(path)
    try:
        tensors, about = container.unpack(path, _check_version)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    try:
        return _network(tensors, about)
    except ValueError as error:
        raise ValueError(f"{path} does not describe a network: {error}") from None
    except Exception as error:  # what is written above and below is meant to tell what is wrong; this catches the rest
        raise ValueError(f"{path} cannot be understood: {type(error).__name__}: {error}") from error


def _apart(constants: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, dense and with memory of its own, and for names of one tensor beyond the first, the first."""
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for name, value in constants.items():
        owner = first.setdefault((value.data_ptr(), value.dtype, value.shape, value.stride(), value.device), name)
        if owner != name and value.numel():
            same[name] = owner
    storages: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in constants.items():
        if name not in same:
            dense = value.detach().cpu().contiguous()
            if dense.untyped_storage().data_ptr() in storages:
                dense = dense.clone()
            storages.add(dense.untyped_storage().data_ptr())
            tensors[name] = dense
    return tensors, same


def _check_version(about: dict[str, Any]) -> None:
    if about.get("format") != FORMAT:
        raise ValueError("is a safetensors file, but not of a frozen network")
    version = field(about, "version", int)
    if version > VERSION:
        writer = field(about, "written_by", dict, {}).get("cnnfast", "of a later version")
        raise ValueError(
            f"was written by cnnfast {writer}, in format {version}; this cnnfast, {__version__}, reads formats up to "
            f"{VERSION}: upgrade cnnfast"
        )
    if version < 1:
        raise ValueError(f"is in format {version}, which there is not")


def _network(tensors: dict[str, Tensor], about: dict[str, Any]) -> Network:
    for name, owner in field(about, "same", dict).items():
        if name in tensors or not isinstance(owner, str) or owner not in tensors:
            raise ValueError(f"constant {shortened(name)} is said to be the same as {shortened(owner)}")
        tensors[name] = tensors[owner]
    for name, value in tensors.items():
        if value.dtype not in DTYPE_NAMES:
            raise ValueError(f"constant {shortened(name)} has dtype {value.dtype}, which files do not have")
    graph = graph_json.from_data(field(about, "graph", dict), tensors)
    preprocessing, classes = about.get("preprocessing"), about.get("classes")
    network = Network(
        graph,
        arguments=Structure.from_json(field(about, "arguments", dict)),
        result=Structure.from_json(field(about, "result", dict)),
        dtype=dtype(field(about, "dtype", str)),
        result_dtypes=tuple(map(dtype, field(about, "result_dtypes", list))),
        example=tuple(tuple(map(size, shape)) for shape in field(about, "example", list)),
        fixed=field(about, "fixed", str),
        preprocessing=None if preprocessing is None else Preprocessing.from_json(preprocessing),
        classes=None if classes is None else tuple(strings(classes, "names of classes")),
    )
    _check(network)
    return network


def _check(network: Network) -> None:
    """Raises ValueError where the parts of a network do not belong together."""
    graph = network.graph
    for condition in graph.conditions:
        check(condition, [len(one.shape) for one in graph.inputs])
    if network.arguments.count != len(graph.inputs):
        raise ValueError(f"the graph takes {len(graph.inputs)} inputs, and the arguments {network.arguments}")
    if any(math.prod(shape) > LARGEST_NUMBER for shape in network.example):
        raise ValueError(f"too large a declared size: an example of {network.example}")
    planned = plan(graph, network.example)
    if not network.result.count == len(planned.results) == len(network.result_dtypes):
        raise ValueError(
            f"there are {len(planned.results)} results, of {len(network.result_dtypes)} dtypes, for {network.result}"
        )
    if network.classes is not None:
        shape = planned.values[planned.results[0]].shape if planned.results else ()
        if shape[-1:] != (len(network.classes),):
            raise ValueError(
                f"there are {len(network.classes)} classes, and the first result has the shape {list(shape)}"
            )
