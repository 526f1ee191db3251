"""Training, transfer and evaluation of networks on images."""
