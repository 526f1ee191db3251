"""Triton kernels for convolutional networks: no autograd, no torch.nn. The PyTorch-facing package is `cnnfast`."""
