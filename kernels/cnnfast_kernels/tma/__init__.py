"""Convolution kernels that load and store by tensor maps: sm_90 and sm_100, half precision, channels_last.

`views.why_not` tells which problems and tensors they serve; gather/ has kernels for all others.
"""
