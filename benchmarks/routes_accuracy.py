"""Whether networks train to the same accuracy by the Gram route as by the ordinary one, in half precision.

    python benchmarks/routes_accuracy.py > benchmarks/results/routes_accuracy.txt

The two routes of a convolution with its batch norm are those of cnnfast/reference/training_routes.py: plain PyTorch on
a CPU that rounds where kernels round; no kernel runs here. By the Gram route go the 1x1 convolutions whose input is
narrower than their output, all others go by the ordinary one. Two networks learn scikit-learn's digits, a fifth of each
class held out: a small residual network, in which such a convolution is a shortcut, and a small ResNet of bottleneck
blocks, the digits enlarged to 16 x 16, in which every block ends in one. Both routes start from the same weights and
see the same batches. Weights are kept in float32, float16 has its loss scaled. Five seeds, the accuracy on what was
held out after the last epoch; a network of PyTorch's own layers in float32 is trained beside them.

The same accuracy means that the means of five seeds differ by no more than half a percentage point, and each is at
least 95 %: networks that learnt nothing would say nothing. Exits with 1 where that does not hold. It takes about ten
minutes of a core.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnfast.demo.digits import load_digits
from cnnfast.reference.training_routes import gram_conv_bn_act, ordinary_conv_bn_act

SEEDS = range(5)
EPOCHS, BATCH, LEARNING_RATE, MOMENTUM, DECAY = 12, 64, 0.1, 0.9, 5e-4
MOST_APART, LEAST = 0.005, 0.95
LARGEST_SCALE = 2.0**16  # of a loss in float16
ORDINARY, GRAM, FLOAT32 = "ordinary", "Gram", "float32"


class Layer(nn.Module):
    """A convolution with its batch norm, an addition and an activation, by one of the routes or, where `route` is
    FLOAT32, by PyTorch's own layers. In eval by the running statistics, in float32.
    """

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, activation: str | None = "relu") -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.norm = nn.BatchNorm2d(outputs)
        self.activation, self.route = activation, FLOAT32

    @property
    def narrow_to_wide(self) -> bool:
        return self.conv.kernel_size == (1, 1) and self.conv.in_channels < self.conv.out_channels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.route == FLOAT32 or not self.training:
            u = self.norm(self.conv(x))
            u = u if residual is None else u + residual
            return u.relu() if self.activation else u
        operands = x, self.conv.weight, self.norm.weight, self.norm.bias, residual, self.norm.eps, self.activation
        if self.route == GRAM and self.narrow_to_wide:
            z, mean, var = gram_conv_bn_act(*operands, self.conv.stride)
        else:
            z, mean, var = ordinary_conv_bn_act(*operands, self.conv.stride, self.conv.padding)
        with torch.no_grad():
            count = z.numel() // z.shape[1]
            self.norm.running_mean.lerp_(mean, 0.1)
            self.norm.running_var.lerp_(var * count / (count - 1), 0.1)
        return z


class Residual(nn.Module):
    """A block: `body` is all but its last layer, which adds the shortcut."""

    def __init__(self, body: nn.Module, last: Layer, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.last, self.shortcut = body, last, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x), self.shortcut(x))


def basic(inputs: int, width: int) -> Residual:
    same = inputs == width
    shortcut = nn.Identity() if same else Layer(inputs, width, 1, activation=None)
    return Residual(Layer(inputs, width, 3), Layer(width, width, 3), shortcut)


def bottleneck(inputs: int, width: int, stride: int = 1) -> Residual:
    same = inputs == 4 * width and stride == 1
    shortcut = nn.Identity() if same else Layer(inputs, 4 * width, 1, stride, activation=None)
    body = nn.Sequential(Layer(inputs, width, 1), Layer(width, width, 3, stride))
    return Residual(body, Layer(width, 4 * width, 1), shortcut)


class Classifier(nn.Module):
    """[N, 1, H, W] to logits [N, 10], in float32: the blocks, a global mean, a linear layer."""

    def __init__(self, features: int, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).float().mean((2, 3)))


def digits_network() -> Classifier:
    return Classifier(32, Layer(1, 16, 3), basic(16, 16), nn.MaxPool2d(3, 2, 1), basic(16, 32))


def bottleneck_network() -> Classifier:
    narrow = bottleneck(8, 8), bottleneck(32, 8)
    return Classifier(64, Layer(1, 8, 3), *narrow, bottleneck(32, 16, 2), bottleneck(64, 16))


NETWORKS: dict[str, tuple[Callable[[], Classifier], int]] = {
    "digits network": (digits_network, 8),
    "bottleneck ResNet": (bottleneck_network, 16),
}


class Data(NamedTuple):
    """Images [N, 1, H, W] from -1 to 1, and labels."""

    images: Tensor
    labels: Tensor
    held_out: Tensor
    right: Tensor


def data(seed: int, size: int) -> Data:
    learnt, held_out = load_digits(seed)
    images = torch.stack([learnt[i].image for i in range(len(learnt))]).movedim(-1, 1).float() / 127.5 - 1

    def enlarged(t: Tensor) -> Tensor:
        return functional.interpolate(t, size=(size, size), mode="nearest")

    return Data(enlarged(images), learnt.labels, enlarged(held_out.images), held_out.labels)


class Scaler:
    """A loss's scale, as torch.amp.GradScaler keeps it: halved by a step whose gradients are not finite, which then is
    left out, and doubled after 200 that are.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.scale, self.good = LARGEST_SCALE if dtype == torch.float16 else 1.0, 0

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(self.scale)
        if all(gradient.isfinite().all() for gradient in gradients):
            optimizer.step()
            self.good += 1
        else:
            self.scale, self.good = self.scale / 2, 0
        if self.good == 200 and self.scale > 1:
            self.scale, self.good = self.scale * 2, 0


def accuracy(build: Callable[[], Classifier], given: Data, route: str, dtype: torch.dtype, seed: int) -> float:
    """Of a network that was trained by `route`, on what was held out."""
    torch.manual_seed(seed)
    network = build()
    for layer in network.modules():
        if isinstance(layer, Layer):
            layer.route = route
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE, MOMENTUM, weight_decay=DECAY, nesterov=True)
    batches = len(given.labels) // BATCH
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * batches)
    scaler, order = Scaler(dtype), torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(given.labels), generator=order)[: batches * BATCH].split(BATCH):
            optimizer.zero_grad()
            logits = network(given.images[rows].to(dtype))
            (functional.cross_entropy(logits, given.labels[rows]) * scaler.scale).backward()
            scaler.step(optimizer, parameters)
            rate.step()
    with torch.no_grad():
        found = network.eval()(given.held_out).argmax(1)
    return float((found == given.right).double().mean())


def main() -> int:
    torch.set_num_threads(1)
    torch.optim.lr_scheduler.warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    began, wrong = time.perf_counter(), []
    print(f"torch {torch.__version__}; {EPOCHS} epochs of batches of {BATCH}; accuracy on held-out digits")
    ways = [(FLOAT32, torch.float32)]
    ways += [(route, dtype) for dtype in (torch.bfloat16, torch.float16) for route in (ORDINARY, GRAM)]
    for name, (build, size) in NETWORKS.items():
        gram = sum(isinstance(m, Layer) and m.narrow_to_wide for m in build().modules())
        print(f"\n{name}: {gram} of its convolutions by the Gram route")
        print(f"{'dtype':<10}{'route':<10}" + "".join(f"{'seed ' + str(seed):>9}" for seed in SEEDS), end="")
        print(f"{'mean':>10}{'spread':>9}")
        sets = [data(seed, size) for seed in SEEDS]
        means = {}
        for route, dtype in ways:
            found = [accuracy(build, given, route, dtype, seed) for seed, given in zip(SEEDS, sets, strict=True)]
            means[route, dtype] = statistics.mean(found)
            cells = "".join(f"{value:>9.2%}" for value in found)
            kind = str(dtype).removeprefix("torch.")
            shown = "PyTorch" if route == FLOAT32 else route
            print(
                f"{kind:<10}{shown:<10}{cells}{means[route, dtype]:>10.2%}{statistics.stdev(found):>9.2%}", flush=True
            )
        for dtype in (torch.bfloat16, torch.float16):
            apart = means[GRAM, dtype] - means[ORDINARY, dtype]
            same = abs(apart) <= MOST_APART and min(means.values()) >= LEAST
            kind = str(dtype).removeprefix("torch.")
            print(f"{kind}: the Gram route's mean is {100 * apart:+.2f} points from the ordinary route's", end="")
            print("" if same else ": NOT THE SAME")
            wrong += [] if same else [(name, dtype)]
    limit = f"within {MOST_APART:.1%} of each other and at least {LEAST:.0%}"
    print(f"\nnot {limit}: {len(wrong)} of {2 * len(NETWORKS)}" if wrong else f"\nall means are {limit}")
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
