"""Depthwise convolution: every channel is convolved by itself, with one filter or with MULTIPLIER of them.

There is no sum over channels, hence nothing for tensor cores, and few multiplications a byte: what counts is to load
little, and wide. A strip is ROWS pixels of the result below each other; a program computes BLOCK_M strips that lie side
by side, of BLOCK_C channels, and a thread one strip of the vector of adjacent channels that a load of 16 bytes takes.
Each row of the input that it loads serves every pixel of the strip whose window it lies in: at stride 1 that is ROWS +
R - 1 loads for a column of the filter, where pixel by pixel it would be ROWS * R. What neighbouring strips load again
comes from the first-level cache.
"""
