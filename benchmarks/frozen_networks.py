"""Whether networks of torchvision and timm compute the same when they are frozen: in float32, with other batches and
image sizes, by both of the CPU's makers; and which of their steps stay PyTorch's.

    python benchmarks/frozen_networks.py > benchmarks/results/frozen_networks.txt

The error is ||frozen - exact|| / ||exact||, where exact is the original in float64, the largest over all results. Its
neighbour is PyTorch's own error in float32. Weights are random, and the statistics of batch norms are those of noise,
so that some networks amplify roundings: where twice PyTorch's own error is beyond the limit, that is the limit.
It takes some ten minutes.
"""

from __future__ import annotations

import copy
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import cnnfast
from cnnfast.engine.cpu import onednn
from cnnfast.engine.planning.planning import plan
from cnnfast.engine.reporting import UNPLANNED
from cnnfast.torchvision_import import torchvision

LIMIT = 1e-5
SIZE, BATCH = 160, 2


class Subject(NamedTuple):
    name: str
    build: Callable[[], nn.Module]


def classifier(name: str, **options: Any) -> Subject:
    return Subject(name, lambda: getattr(torchvision().models, name)(weights=None, **options))


def segmenter(name: str) -> Subject:
    return Subject(name, lambda: getattr(torchvision().models.segmentation, name)(weights=None, weights_backbone=None))


def backbone(name: str) -> Subject:
    def build() -> nn.Module:
        utils: Any = torchvision().models.detection.backbone_utils
        return utils.resnet_fpn_backbone(backbone_name=name, weights=None)

    return Subject(f"{name} with feature pyramid", build)


def of_timm(name: str) -> Subject:
    def build() -> nn.Module:
        torchvision()  # before timm, which imports it
        import timm

        return timm.create_model(name)

    return Subject(name, build)


SUBJECTS = (
    *map(
        classifier, ("alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "densenet121", "squeezenet1_1")
    ),
    *map(classifier, ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "mnasnet0_5")),
    *map(classifier, ("shufflenet_v2_x1_0", "regnet_y_400mf", "convnext_tiny")),
    classifier("vit_b_16", image_size=SIZE),
    *(classifier(name, init_weights=False, aux_logits=False) for name in ("googlenet", "inception_v3")),
    *map(segmenter, ("fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large")),
    *map(backbone, ("resnet18", "resnet50")),
    *map(of_timm, ("seresnet18", "ecaresnet26t", "resnetv2_50", "nfnet_l0", "repvgg_a0", "mobileone_s0", "darknet53")),
    *map(of_timm, ("cspresnet50", "res2net50_26w_4s", "hrnet_w18_small", "ghostnet_100", "tf_efficientnet_b0")),
    *map(of_timm, ("convnextv2_atto", "mixnet_s", "regnety_002", "mobilevit_xxs", "efficientvit_b0", "dla34")),
)


def settled(model: nn.Module) -> nn.Module:
    """With statistics of batch norms that come from noise, as a trained network has some that come from images."""
    for parameter in model.parameters():
        if not parameter.detach().any():  # a head of zeros, say, which gives nothing to compare
            nn.init.normal_(parameter, std=0.02)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # an average of all batches
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, SIZE, SIZE))
    return model.eval()


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    assert len(found) == len(exact)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def sizes() -> Iterator[tuple[int, int, int]]:
    """Batch, height and width: those of the example, another batch, and other images."""
    yield BATCH, SIZE, SIZE
    yield 3, SIZE, SIZE
    yield 1, 192, 224


def judged(subject: Subject) -> tuple[str, bool]:
    """What is printed of it, and whether all of it is within the limit."""
    torch.manual_seed(0)
    model = settled(subject.build())
    began = time.perf_counter()
    frozen = cnnfast.freeze(model, torch.randn(BATCH, 3, SIZE, SIZE))
    seconds = time.perf_counter() - began
    report = frozen.report()
    if report.runner == UNPLANNED:
        return f"{subject.name}: not captured: {report.why}", False
    exactly = copy.deepcopy(model).double()
    cells, right, stayed = [], True, Counter[str]()
    for shape in sizes():
        images = torch.randn(shape[0], 3, *shape[1:])
        text = "x".join(map(str, shape))
        with torch.inference_mode():
            try:
                exact, own = tensors(exactly(images.double())), tensors(model(images))
            except Exception as refused:  # a network for images of one size
                cells.append(f"{text} refused by the network itself ({type(refused).__name__})")
                continue
        try:
            found = tensors(frozen(images))
        except ValueError as refused:
            cells.append(
                f"{text} refused: {re.sub(r' [(]/[^)]*[)]', '', str(refused))}"
            )  # without files of this machine
            continue
        graph = frozen.network.graph
        runner = onednn.build(plan(graph, [tuple(images.shape)]), graph.constants)
        errors = [error(found, exact), error(list(runner([images])), exact)]
        stayed |= Counter(served for served in runner.served_by().values() if served.startswith("PyTorch"))
        pytorchs = error(own, exact)
        right &= max(errors) <= max(LIMIT, 2 * pytorchs)
        cells.append(f"{text} {errors[0]:.1e}, by oneDNN {errors[1]:.1e}, PyTorch's own {pytorchs:.1e}")
    lines = [f"{subject.name} (frozen in {seconds:.1f} s, by {report.runner})", *(f"  {cell}" for cell in cells)]
    if stayed:
        names = ", ".join(f"{name.removeprefix('PyTorch ')} x{count}" for name, count in sorted(stayed.items()))
        lines.append(f"  stay PyTorch's: {names}")
    return "\n".join(lines), right


def main(
    network: Annotated[list[str] | None, typer.Option(help="Only this one; repeat it for several.")] = None,
) -> None:
    """Compare frozen networks with their originals in float64."""
    subjects = [subject for subject in SUBJECTS if not network or subject.name in network]
    print(f"torch {torch.__version__}; {len(subjects)} networks; the limit is {LIMIT:g}", flush=True)
    wrong = []
    for subject in subjects:
        print(subject.name, file=sys.stderr)
        text, right = judged(subject)
        print(text, flush=True)
        wrong += [subject.name] * (not right)
    print(f"beyond the limit, or not captured: {', '.join(wrong)}" if wrong else "all within the limit")
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
