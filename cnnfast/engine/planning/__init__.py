"""From a graph to a plan for inputs of one size."""
