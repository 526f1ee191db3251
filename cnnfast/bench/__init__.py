"""What cnnfast is worth on this machine: models and layers against the strongest baselines, with the roofline, losses
first.

A job (job.py, shapes.py, numbers.py) and who is to do it are a task (task.py); tasks are run one after the other
(series.py), each (running.py) by providers (providers.py; folding.py and jax_model.py are two of them): compiled ahead
(ahead.py), gated (gate.py), timed (measuring/), and looked at besides (footprint.py), in surroundings that are alike
(surroundings.py). Rows (rows.py) hold what was found beside what the machine allows (roofline.py, graph.py), as text
(report.py), pictures (pictures.py) or against an earlier run (compare.py).
"""
