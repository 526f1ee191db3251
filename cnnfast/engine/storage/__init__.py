"""A frozen network in a file."""
