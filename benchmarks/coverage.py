"""How much of 24 families of networks conversion serves: convolutions fused, norms fused with their activation, and the
shares of FLOPs and bytes, in eval and in training mode.

    python benchmarks/coverage.py --before benchmarks/results/coverage_before.json > benchmarks/results/coverage.txt

Everything is on meta tensors: nothing is computed, no GPU is asked, and it takes a minute or two. Shares are of one
forward pass on two images; bytes are computed from shapes and dtypes, not measured (cnnfast.report). Networks are those
of torchvision and timm, and those of small_networks.py.

--before FILE: another version's numbers to print beside these. That version writes them with --json FILE:

    git worktree add ../before 6653714
    PYTHONPATH=../before:../before/kernels python benchmarks/coverage.py --json FILE

Its report may be one that does not count bytes: their place is then empty.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import small_networks
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import cnnfast
from cnnfast.torchvision_import import torchvision

MODES = ("infer", "train")
WIDTH = 120


class Network(NamedTuple):
    """sizes: of its inputs; of a list of them where it takes one."""

    family: str
    name: str
    build: Callable[[], nn.Module]
    sizes: tuple[tuple[int, ...], ...] = ((2, 3, 224, 224),)
    takes_a_list: bool = False

    def inputs(self) -> tuple[Any, ...]:
        tensors = [torch.empty(size, device="meta") for size in self.sizes]
        return (tensors,) if self.takes_a_list else tuple(tensors)


def of_torchvision(family: str, name: str, **options: Any) -> Network:
    return Network(family, name, lambda: getattr(torchvision().models, name)(weights=None, **options))


def of_timm(family: str, name: str, deployed: bool = False) -> Network:
    def build() -> nn.Module:
        torchvision()  # before timm, which imports it
        import timm
        from timm.utils.model import reparameterize_model

        model = timm.create_model(name)
        return reparameterize_model(model) if deployed else model

    return Network(family, f"{name}, deployed" if deployed else name, build)


def deeplab() -> nn.Module:
    return torchvision().models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)


def retinanet_head() -> nn.Module:
    return torchvision().models.detection.retinanet.RetinaNetHead(256, 9, 91)


PYRAMID = tuple((2, 256, n, n) for n in (64, 32, 16, 8, 4))
NETWORKS = [
    of_torchvision("AlexNet", "alexnet"),
    of_torchvision("VGG", "vgg16"),
    of_torchvision("ResNet", "resnet50"),
    of_torchvision("ResNeXt", "resnext50_32x4d"),
    of_torchvision("DenseNet", "densenet121"),
    of_torchvision("MobileNet V2", "mobilenet_v2"),
    of_torchvision("MobileNet V3", "mobilenet_v3_large"),
    of_torchvision("EfficientNet", "efficientnet_b0"),
    of_torchvision("ConvNeXt", "convnext_tiny"),
    of_torchvision("RegNet", "regnet_y_400mf"),
    of_torchvision("ShuffleNet", "shufflenet_v2_x1_0"),
    of_torchvision("SqueezeNet", "squeezenet1_1"),
    of_torchvision("Inception", "googlenet", init_weights=False),
    of_timm("RepVGG", "repvgg_a0", deployed=True),
    of_timm("MobileOne", "mobileone_s0", deployed=True),
    of_timm("EfficientNet, TensorFlow's", "tf_efficientnet_b0"),
    of_timm("ResNet V2", "resnetv2_50"),
    of_timm("Darknet", "darknet53"),
    of_timm("NFNet", "nfnet_l0"),
    Network("segmentation", "deeplabv3_resnet50", deeplab),
    Network("detection", "RetinaNet head", retinanet_head, PYRAMID, takes_a_list=True),
    Network("GAN", "DCGAN generator", small_networks.dcgan_generator, ((2, 100, 1, 1),)),
    Network("GAN", "DCGAN discriminator", small_networks.dcgan_discriminator, ((2, 3, 64, 64),)),
    Network("super-resolution", "EDSR", small_networks.Edsr, ((2, 3, 48, 48),)),
    Network("super-resolution", "SRGAN generator", small_networks.Srgan, ((2, 3, 48, 48),)),
    Network("super-resolution", "ESRGAN generator", small_networks.Esrgan, ((2, 3, 48, 48),)),
    Network("U-Net", "U-Net", small_networks.UNet, ((2, 3, 256, 256),)),
]


def numbers(report: Any) -> dict[str, Any]:
    """What is kept of a report: {convolutions, fused, norms, norms with their activation, FLOPs, bytes}; the last two
    are shares.
    """
    norms = [row for row in report.rows if "BatchNorm" in row.kind]
    return {
        "convolutions": sum(row.convolution for row in report.rows),
        "fused": report.count("fused"),
        "norms": len(norms),
        "with activation": sum(row.status == "fused" and activates(row) for row in norms),
        "flops": report.coverage,
        "bytes": getattr(report, "coverage_bytes", None),
    }


def activates(row: Any) -> bool:
    """Whether the step that a norm is fused into ends with an activation: what a report calls it comes after the norm,
    whose name it gives, or whose class where the name is a number.
    """
    parts = row.reason.split(" + ")
    own = row.name.rpartition(".")[2]
    after = parts[parts.index(own if own in parts else row.kind) + 1 :]
    return any(part != "residual" for part in after)


def surveyed(network: Network) -> dict[str, dict[str, Any]]:
    """The numbers of a network, by mode."""
    model = cnnfast.convert(network.build().to("meta"), inplace=True)
    found = {}
    for mode in MODES:
        model.train(mode == "train")
        with torch.set_grad_enabled(mode == "train"):
            found[mode] = numbers(cnnfast.report(model, *network.inputs()))
    return found


def about() -> dict[str, str]:
    """What was surveyed, and with what."""
    import timm

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        folder = Path(cnnfast.__file__).parent.parent
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)

    commit = git("rev-parse", "--short", "HEAD").stdout.strip() or "unknown"
    if git("diff", "--quiet", "HEAD", "--", "cnnfast", "kernels").returncode:
        commit += ", with changes that are not committed"
    versions = {"torch": torch.__version__, "torchvision": torchvision().__version__, "timm": timm.__version__}
    return {"commit": commit, **versions}


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def change(before: Any, after: Any) -> str:
    return f"{before} > {after}" if before not in (None, "") else str(after)


def table(mode: str, found: dict[str, Any], before: dict[str, Any]) -> Table:
    made = Table(title=f"{mode}", title_justify="left", box=None)
    for heading in ("family", "network", "convolutions fused", "norms with activation", "FLOPs served", "bytes served"):
        made.add_column(heading, justify="left" if heading in ("family", "network") else "right")
    for network in NETWORKS:
        now, then = found[network.name][mode], before.get(network.name, {}).get(mode, {})
        made.add_row(
            network.family,
            network.name,
            f"{change(then.get('fused'), now['fused'])} of {now['convolutions']}",
            f"{change(then.get('with activation'), now['with activation'])} of {now['norms']}" if now["norms"] else "",
            change(percent(then.get("flops")), percent(now["flops"])),
            change(percent(then.get("bytes")), percent(now["bytes"])),
        )
    return made


def main(
    before: Annotated[Path | None, typer.Option(help="Numbers of another version, to print beside these.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
) -> None:
    """Convolutions fused, and shares of FLOPs and bytes served, of 24 families of networks."""
    earlier = json.loads(before.read_text()) if before else {"about": {}, "networks": {}}
    found = {}
    for network in NETWORKS:
        print(network.name, file=sys.stderr)
        found[network.name] = surveyed(network)
    printed = io.StringIO()
    console = Console(file=printed, width=WIDTH, color_system=None, force_terminal=False)
    console.print(", ".join(f"{name} {value}" for name, value in about().items()))
    if before:
        console.print(f"Before, left of each >: commit {earlier['about']['commit']}.")
    console.print("Shares of one forward pass. Bytes are computed from shapes and dtypes, not measured.")
    for mode in MODES:
        console.print(table(mode, found, earlier["networks"]))
    print("\n".join(line.rstrip() for line in printed.getvalue().splitlines()))
    if json_:
        json_.write_text(json.dumps({"about": about(), "networks": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
