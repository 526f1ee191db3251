"""freeze: a trained network becomes data that runs fast, and one file. load: reads such a file.

A model is captured (capture.py) as a graph of calls (graph.py) of operators from a fixed list (operators.py), rewritten
(folding.py), planned for inputs of one size (planning.py, plan.py), and run (runtime.py) by onnxruntime or oneDNN
(cpu/). file.py writes and reads graphs, with what surrounds them (network.py).
"""

from __future__ import annotations

from .freezing import freeze
from .frozen import Frozen, load

__all__ = ["Frozen", "freeze", "load"]
