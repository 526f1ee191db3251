"""Triton kernels for convolutional networks: no autograd, no torch.nn. The PyTorch-facing package is `cnnfast`."""

__version__ = "0.2.0"
