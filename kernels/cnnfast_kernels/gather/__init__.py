"""Convolution kernels that load with pointers: every GPU, every stride, dilation, group count and memory layout."""
