"""How well, and in what time, `fit` learns scikit-learn's digits with its usual options: five seeds, of the network, of
what is held out and of all that is drawn.

    python benchmarks/digits_training.py

Prints, and writes to benchmarks/results/cpu/digits_training.txt, for each seed the accuracy on the 359 or so digits
that were held out, of the epoch that was best on them and of the last one, and the seconds.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path

from cnnfast.demo.digits import make_network
from cnnfast.training import fit

RESULT = Path(__file__).parent / "results" / "cpu" / "digits_training.txt"
WANTED = 0.985

if __name__ == "__main__":
    used = f"torch {version('torch')}, one thread, on a machine of {os.cpu_count()} cores"
    lines = [f"seed  best    last    seconds   ({used})"]
    print(lines[0])
    reached = 0
    for seed in range(5):
        run = fit(make_network(seed), "digits", seed=seed, progress=False)
        last = run.history[-1].validation_accuracy
        reached += (run.accuracy or 0) >= WANTED
        lines.append(f"{seed:4}  {run.accuracy:.2%}  {last:.2%}  {run.seconds:7.1f}")
        print(lines[-1], flush=True)
    lines.append(f"{reached} of 5 reach {WANTED:.1%}")
    print(lines[-1])
    RESULT.write_text("\n".join(lines) + "\n")
    sys.exit(reached < 4)
