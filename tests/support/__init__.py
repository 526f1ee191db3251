"""What the tests share: operands, references, networks, processes, the rings."""
