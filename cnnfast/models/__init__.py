"""Whole networks of cnnfast.nn's blocks, with torchvision's constructors, state_dict and numbers.

They start untrained. Weights that torchvision has trained load as they are:

    model = cnnfast.models.resnet50()
    model.load_state_dict(torchvision.models.resnet50(weights="DEFAULT").state_dict())
"""

from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x4d, wide_resnet50_2

__all__ = ["ResNet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"]
