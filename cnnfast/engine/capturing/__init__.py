"""From a module to a graph of operators."""
