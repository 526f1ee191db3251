"""Networks that nobody here wrote: every family that conversion has to cope with, each small and with an example input.

Real models of torchvision, timm and transformers, made small by arguments of their own; written out where no package
has one. What constructors leave constant (affine parameters, running statistics, layer scales, residual gains) is made
random: a 0 or a 1 hides mistakes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.support.packages import package


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Makes every constant parameter and running statistic random: around 1 if it is positive, around 0 otherwise."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= {name: t for name, t in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    for t in tensors.values():
        if t.numel() and t.min() == t.max():
            t.uniform_(0.5, 1.5) if t.flatten()[0] > 0 else t.normal_(0, 0.2)
    return model


@dataclass(frozen=True, slots=True)
class Family:
    package: str  # "" for what is written out here
    name: str
    build: Callable[[Any], nn.Module]  # given the package
    size: tuple[int, ...] = (2, 3, 64, 64)

    def __str__(self) -> str:
        return f"{self.package}-{self.name}".removeprefix("-")

    def make(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
        """The same model and input on every call. Skips the test where the package is not installed."""
        module = package(self.package) if self.package else None
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constructors whose defaults are about to change
            torch.manual_seed(0)
            model = randomise(self.build(module)).to(dtype)
            return model, torch.randn(self.size, dtype=torch.float64).to(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# torchvision


def vgg(torchvision: Any) -> nn.Module:
    """A VGG with two small layers for a classifier: its own has 120 million weights."""
    with torch.device("meta"):
        model = torchvision.models.VGG(nn.Identity(), init_weights=False)
    model.features = torchvision.models.vgg.make_layers([16, "M", 32, "M", 32, 32, "M", 64, 64, "M"], batch_norm=True)
    model.avgpool = nn.AdaptiveAvgPool2d((3, 3))
    model.classifier = nn.Sequential(nn.Linear(64 * 9, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
    return model


def resnext(torchvision: Any) -> nn.Module:
    resnet = torchvision.models.resnet
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4, num_classes=10)


def convnext(torchvision: Any) -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt(
        [block(16, 32, 1), block(32, None, 2)], stochastic_depth_prob=0.5, num_classes=10
    )


def feature_pyramid(torchvision: Any, **options: Any) -> nn.Module:
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone
    return backbone(backbone_name="resnet18", weights=None, trainable_layers=3, **options)


def segmentation(name: str, torchvision: Any) -> nn.Module:
    return getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=3)


FAMILIES = [
    Family("torchvision", "vgg11_bn", vgg, (2, 3, 32, 32)),
    *[
        Family("torchvision", name, lambda torchvision, name=name: getattr(torchvision.models, name)(num_classes=10))
        for name in (
            "resnet18",
            "resnet50",
            "mobilenet_v3_small",
            "efficientnet_b0",
            "regnet_x_400mf",
            "regnet_y_400mf",
            "shufflenet_v2_x0_5",
            "squeezenet1_1",
            "mnasnet0_5",
        )
    ],
    Family("torchvision", "resnext", resnext),
    Family(
        "torchvision",
        "mobilenet_v2",
        lambda torchvision: torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=10),
    ),
    Family(
        "torchvision", "densenet", lambda torchvision: torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10)
    ),
    Family(
        "torchvision", "googlenet", lambda torchvision: torchvision.models.googlenet(num_classes=10, init_weights=False)
    ),
    Family(
        "torchvision",
        "inception_v3",
        lambda torchvision: torchvision.models.inception_v3(num_classes=10, init_weights=False, aux_logits=False),
        (2, 3, 75, 75),
    ),
    Family("torchvision", "convnext", convnext),
    Family("torchvision", "deeplabv3_mobilenet_v3", functools.partial(segmentation, "deeplabv3_mobilenet_v3_large")),
    Family("torchvision", "lraspp_mobilenet_v3", functools.partial(segmentation, "lraspp_mobilenet_v3_large")),
    Family("torchvision", "feature_pyramid", functools.partial(feature_pyramid, norm_layer=nn.BatchNorm2d)),
    Family("torchvision", "feature_pyramid_frozen_bn", feature_pyramid),
]

# ----------------------------------------------------------------------------------------------------------------------
# timm

FAMILIES += [
    Family("timm", name, lambda timm, name=name: timm.create_model(name, num_classes=10))
    for name in (
        "resnetv2_50",  # batch norm and activation before the convolution
        "resnet26d",
        "seresnext26t_32x4d",
        "skresnet18",
        "resnest14d",
        "res2net50_14w_8s",
        "resnetaa34d",  # blurred downsampling
        "hrnet_w18_small",
        "dla46_c",
        "cspresnet50",
        "ese_vovnet19b_slim",
        "dpn48b",
        "densenet121",
        "selecsls42",
        "hgnetv2_b0",
        "tf_efficientnetv2_b0",  # convolutions with TensorFlow's padding
        "mixnet_s",  # several kernel sizes in one layer
        "mobilenetv3_small_050",
        "mobilenetv4_conv_small_050",
        "ghostnet_050",
        "rexnet_100",
        "repvgg_a0",  # parallel branches, to be merged after training
        "fastvit_t8",
        "nf_regnet_b0",  # no batch norm: standardised weights
        "convnext_atto",
        "inception_next_atto",
        "efficientvit_m0",
        "mobilevit_xxs",
    )
]
FAMILIES += [
    Family("timm", "levit_conv_128s", lambda timm: timm.create_model("levit_conv_128s", img_size=64, num_classes=10)),
    Family(
        "timm", "coatnet_pico_rw", lambda timm: timm.create_model("coatnet_pico_rw_224", img_size=64, num_classes=10)
    ),
    Family("timm", "hrnet_w18_small_features", lambda timm: timm.create_model("hrnet_w18_small", features_only=True)),
]

# ----------------------------------------------------------------------------------------------------------------------
# transformers

SMALL = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1]}


def classifier(name: str, options: dict[str, Any], transformers: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(num_labels=10, **options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def upernet(transformers: Any) -> nn.Module:
    backbone = transformers.ResNetConfig(**SMALL, out_features=["stage1", "stage2", "stage3", "stage4"])
    sizes = {"hidden_size": 32, "auxiliary_in_channels": 48, "auxiliary_channels": 16}
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=backbone, num_labels=5, **sizes)
    )


FAMILIES += [
    Family("transformers", name, functools.partial(classifier, name, options))
    for name, options in (
        ("ResNet", SMALL),
        ("RegNet", {**SMALL, "groups_width": 8}),
        ("ConvNext", {"hidden_sizes": SMALL["hidden_sizes"], "depths": SMALL["depths"], "drop_path_rate": 0.3}),
        ("MobileNetV1", {"depth_multiplier": 0.25, "classifier_dropout_prob": 0.2}),
        ("MobileNetV2", {"depth_multiplier": 0.25}),
        ("EfficientNet", {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}),
        ("Bit", {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2], "num_groups": 8}),
    )
]
FAMILIES.append(Family("transformers", "UperNet", upernet))

# ----------------------------------------------------------------------------------------------------------------------
# Traced by torch.fx


def extractor(torchvision: Any) -> nn.Module:
    """Two maps of a residual network by name, as object detectors take them."""
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(resnext(torchvision), {"layer2": "middle", "layer4": "last"})


def traced_features(timm: Any) -> nn.Module:
    return timm.create_model("resnet10t", features_only=True, feature_cls="fx", out_indices=(1, 3))


FAMILIES.append(Family("torchvision", "feature_extractor", extractor))
FAMILIES.append(Family("timm", "features_by_fx", traced_features))

# ----------------------------------------------------------------------------------------------------------------------
# Written out


def discriminator() -> nn.Module:
    """Miyato and others 2018: every weight is divided by its largest singular value, which training tracks by power
    iteration.
    """
    norm = parametrizations.spectral_norm
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 16), (16, 32)):
        layers += [norm(nn.Conv2d(before, after, 3, padding=1)), nn.LeakyReLU(0.1)]
        layers += [
            norm(nn.Conv2d(after, after, 4, 2, 1, bias=False)),
            nn.BatchNorm2d(after),
            nn.LeakyReLU(0.1, inplace=True),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(nn.Linear(32, 1)))


class Decoder(nn.Module):
    """Lengths and directions of its weights are learnt apart (Salimans, Kingma 2016), transposed convolutions' too."""

    def __init__(self) -> None:
        super().__init__()
        norm = parametrizations.weight_norm
        self.stem = norm(nn.Conv2d(3, 16, 1))
        self.up = nn.ModuleList(norm(nn.ConvTranspose2d(c, c // 2, 4, 2, 1), dim=1) for c in (16, 8))
        self.smooth = nn.ModuleList(
            nn.Sequential(norm(nn.Conv2d(c, c, 3, padding=1, groups=2)), nn.BatchNorm2d(c), nn.SiLU()) for c in (8, 4)
        )
        self.head = norm(nn.Conv2d(4, 3, 3, padding="same", padding_mode="reflect"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, smooth in zip(self.up, self.smooth, strict=True):
            x = up(x)
            x = smooth(x) + x
        return self.head(x)


FAMILIES.append(Family("", "spectral_norm", lambda package: discriminator(), (2, 3, 32, 32)))
FAMILIES.append(Family("", "weight_norm", lambda package: Decoder(), (2, 3, 8, 8)))


class DoubleConv(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        layers = []
        for channels in (before, after):
            layers += [nn.Conv2d(channels, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UNet(nn.Module):
    """Ronneberger, Fischer, Brox 2015, with batch norm and padded convolutions."""

    def __init__(self, channels: tuple[int, ...] = (8, 16, 32), classes: int = 3) -> None:
        super().__init__()
        pairs = list(zip((3, *channels[:-1]), channels, strict=True))
        self.down = nn.ModuleList(DoubleConv(*pair) for pair in pairs)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(nn.ConvTranspose2d(high, low, 2, stride=2) for low, high in reversed(pairs[1:]))
        self.merge = nn.ModuleList(DoubleConv(2 * low, low) for low, _ in reversed(pairs[1:]))
        self.head = nn.Conv2d(channels[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(self.pool(x) if i else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x)


FAMILIES.append(Family("", "unet", lambda package: UNet(), (2, 3, 32, 32)))
