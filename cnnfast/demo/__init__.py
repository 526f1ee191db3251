"""What `cnnfast demo` shows: a network trained on real digits, and the kernels judged on real images."""
