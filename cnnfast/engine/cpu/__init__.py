"""Makers of runners for a CPU: onnxruntime where it is installed, PyTorch's oneDNN elsewhere."""
