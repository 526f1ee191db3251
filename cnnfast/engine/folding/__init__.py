"""From a captured graph to one with fewer calls."""
