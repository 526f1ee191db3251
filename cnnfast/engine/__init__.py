"""freeze: a trained network becomes data that runs fast, and one file. load: reads such a file.

A model is captured (capturing/) as a graph of calls (graph.py) of operators from a fixed list (operators.py), rewritten
(folding/), planned for inputs of one size (planning/, plan.py), and run (serving.py, runtime.py) by onnxruntime or
oneDNN (cpu/). freezing.py does all that and compares the result with the original (judging.py, original.py); what
cannot be captured runs converted (unplanned.py). storage/ writes and reads a network (network.py) as a file, and
images/ makes its inputs of image files. What users hold is frozen.py's, with its report and profile.
"""

from __future__ import annotations

from .freezing import freeze
from .frozen import Frozen, load

__all__ = ["Frozen", "freeze", "load"]
