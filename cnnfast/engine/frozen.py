"""A frozen network, as it is called, saved, loaded and looked into."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .accepting import accept
from .capturing.capture import CannotCapture
from .folding.folding import fold
from .graph import Input
from .images.preprocessing import Preprocessing
from .judging import SelfCheck
from .network import Network
from .original import Original
from .profiling import Profile, profile_of
from .reporting import FrozenReport, report_on
from .runtime import Shapes
from .serving import Serving, plainly, shapes_of
from .storage import file


class Frozen:
    """A network that `cnnfast.freeze` made or `cnnfast.load` read. It is called as the model was, with positional
    arguments, and returns the same structure of tensors, for any batch size.

        y = frozen(x)
        print(frozen.report())  # each step, what serves it, what was fused
        frozen.save("model.cnnfast")

    Inputs are tensors on the CPU; floating-point ones are cast to the network's dtype. Results are dense tensors of the
    caller's own, without gradients, in the dtypes of the original's results. Calls from several threads at once are
    fine. Plans are made for each input size when it first comes, and the last few are kept. They use as many threads as
    torch.get_num_threads() says when they are made: set that before the first call.

    The first call with another image size captures the model again, with sizes left free, from a private copy that is
    kept until then, or until `save`. That takes some seconds, and at most a minute; where it fails, the image size is
    fixed, and another one is refused with the reason.

    Attributes: network (graph, structures; plain data), dtype (torch.dtype that it computes in), example (the shapes
    that it was frozen with), preprocessing and classes (or None).

    Raises ValueError, by the name of the argument, for inputs of another structure, kind, device or size. It cannot be
    pickled: save and load it. copy.deepcopy gives the same object, since nothing in it can be changed.

    Made by those two functions; original: what other image sizes are captured from, notes: sentences for the report.
    """

    def __init__(
        self,
        network: Network,
        *,
        original: Original | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self._serving = Serving(network)
        self._original = original
        self._check: SelfCheck | None = None
        self._notes = tuple(notes)
        self._growing = threading.Lock()

    @property
    def network(self) -> Network:
        return self._serving.network

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def example(self) -> Shapes:
        return self.network.example

    @property
    def preprocessing(self) -> Preprocessing | None:
        return self.network.preprocessing

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.network.classes

    def __call__(self, *inputs: Any) -> Any:
        leaves = self._accepted(inputs)
        return self._for(leaves)(leaves)

    def save(self, path: str | Path) -> None:
        """Writes the network into one file, conventionally named *.cnnfast, which `cnnfast.load` reads without the
        model's code. The file is replaced as a whole: a reader finds the old one or the new one.

        The first time, the model is captured with its image sizes left free, as after a call with another size.
        Raises OSError where the file cannot be written, ValueError where the preprocessing makes images of a size that
        the network does not take.
        """
        self._grow()
        self._check_preprocessing()
        file.write(self.network, path)

    def to_onnx(self, path: str | Path) -> None:
        """Writes the network as an ONNX model, with any batch size and the image size of the example, for other
        runtimes.

        Raises ImportError without onnx, ValueError where a step has no form in ONNX.
        """
        from .cpu import onnx_graph

        try:
            model = onnx_graph.to_onnx(
                self.network.graph, self.example, [one.name for one in self.network.graph.inputs]
            )
        except ModuleNotFoundError as error:
            raise ImportError(f"{error.name} is not installed: pip install '.[cpu]' brings it") from None
        onnx_graph.save(model, path)

    def report(self) -> FrozenReport:
        """Each step at the size of the example: what serves it, and what was fused into it. str() is a table; .steps,
        .summary and .to_json() are for programs.
        """
        return report_on(self._serving.runners, self.network, self._sizes(), self._check, self._notes)

    def profile(self, *inputs: Any) -> Profile:
        """Runs the network on these inputs with a clock, and says how many microseconds each step takes. str() is a
        table, .picture("profile.png") a picture; .steps and .to_json() are for programs.

        Raises ValueError as a call does.
        """
        leaves = self._accepted(inputs)
        serving = self._for(leaves)
        with plainly():
            return profile_of(serving.runners, leaves)

    def self_check(self, original: Original) -> SelfCheck | None:
        """Compares the results on the example with the original's, and keeps what was found for the report. None where
        they cannot be compared.
        """
        self._check = original.check(self._serving.on, self.network.result)
        return self._check

    def _check_preprocessing(self) -> None:
        how = self.preprocessing
        if how is not None:
            how.check_sizes(self.network)
            if how.output_size and (reason := self._serving.refusal(((1, len(how.mean), *how.output_size),))):
                raise ValueError(f"the preprocessing makes images that the network does not take: {reason}")

    def _accepted(self, inputs: tuple[Any, ...]) -> list[Tensor]:
        network = self.network
        return accept(inputs, network.arguments, network.graph.inputs, network.dtype)

    def _for(self, leaves: Sequence[Tensor]) -> Serving:
        """What serves inputs of these sizes. Raises ValueError if nothing does."""
        shapes = shapes_of(leaves)
        serving = self._serving
        if serving.refusal(shapes) and _is_another_image_size(serving.network, shapes):
            self._grow(leaves)  # does nothing if it was done before, perhaps by another thread just now
            serving = self._serving
        if reason := serving.refusal(shapes):
            raise ValueError(f"frozen(): {reason}")
        return serving

    def _grow(self, leaves: Sequence[Tensor] | None = None) -> None:
        """Lets the image size be any, if that can be had and was not tried before. leaves: the inputs of a call that
        needs it, by which the new graph is checked, or else by the example.
        """
        with self._growing:
            original = self._original
            if original is None:
                return
            if not _takes_images(self.network):
                self._original = None
                return
            try:
                captured = original.captured_with_any_size()
                graph = fold(captured.graph, self.dtype, self.example)
                grown = Serving(replace(self.network, graph=graph))
                check = self._checked(grown, original, leaves)
                if not check.ok:
                    raise CannotCapture(f"with its image sizes free it computes something else:\n{check}")
                self._serving = grown
            except CannotCapture as error:
                self._serving = self._serving.fixed(f"{original.name} has only this image size: {error}")
            self._original = None

    def _checked(self, grown: Serving, original: Original, leaves: Sequence[Tensor] | None) -> SelfCheck:
        """How far a graph for any image size is from the original: at the size of these inputs, if both take them, and
        else at the size of the example.
        """
        result = self.network.result
        if leaves is not None and not grown.refusal(shapes_of(leaves)) and all(t.numel() for t in leaves):
            one = self.network.arguments.build(_one_of_each(self.network, leaves))
            with suppress(RuntimeError, ValueError):  # too small an image, for example: the call will say so
                return original.check(grown.on, result, one)
        return original.check(grown.on, result)

    def _sizes(self) -> str:
        """What a report says of image sizes."""
        if not _takes_images(self.network):
            return "none, it takes no images"
        if self.network.fixed:
            return f"fixed: {self.network.fixed}"
        return "any" if self._original is None else "as the example's so far; others are captured when they first come"

    def __repr__(self) -> str:
        network = self.network
        given = zip(network.graph.inputs, network.example, strict=True)
        takes = ", ".join(f"{one.name} {_with_batch(one, shape)}" for one, shape in given)
        dtype = str(network.dtype).removeprefix("torch.")
        classes = f", {len(network.classes)} classes" if network.classes else ""
        return (
            f"<cnnfast.Frozen of {takes}, {dtype}{classes}, {_steps(network)} steps; print(frozen.report()) lists them>"
        )

    def __copy__(self) -> Frozen:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Frozen cannot be pickled: frozen.save(path) writes it, and cnnfast.load(path) reads it")


def load(path: str | Path) -> Frozen:
    """The frozen network in a file that `Frozen.save` or `cnnfast freeze` wrote. Needs no code of the model, and runs
    none: the file holds weights and a list of operators that must all be known here.

        frozen = cnnfast.load("model.cnnfast")
        y = frozen(x)

    path: of the file. Plans are made when the network is first called, so that loading takes no longer than reading.
    Raises FileNotFoundError without the file, ValueError, which names the file and what is wrong, for one that is
    truncated, altered, foreign, or written by a newer version.
    """
    return Frozen(file.read(path))


def _takes_images(network: Network) -> bool:
    """Whether an input has sizes that a capture could leave free, beside the batch."""
    return any(len(one.shape) > 2 for one in network.graph.inputs)


def _is_another_image_size(network: Network, shapes: Shapes) -> bool:
    """Whether nothing but heights, widths and depths of images are not what the network takes."""
    return all(
        wanted is None or size == wanted or axis >= 2
        for one, shape in zip(network.graph.inputs, shapes, strict=True)
        for axis, (size, wanted) in enumerate(zip(shape, one.shape, strict=True))
    )


def _one_of_each(network: Network, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The first of each batch: enough to check what is computed for an image size."""
    return [
        t[:1] if one.shape and one.shape[0] is None else t for t, one in zip(leaves, network.graph.inputs, strict=True)
    ]


def _with_batch(one: Input, shape: Sequence[int]) -> str:
    """The shape of the example, with N for a batch size that may be any."""
    first = ["N"] if one.shape[:1] == (None,) else list(map(str, shape[:1]))
    return f"[{', '.join([*first, *map(str, shape[1:])])}]"


def _steps(network: Network) -> int:
    return sum(node.op == "call_function" for node in network.graph.calls.nodes)
