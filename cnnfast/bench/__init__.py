"""What cnnfast is worth on this machine: models and layers against the strongest baselines, with the roofline, losses first.

A job (job.py, shapes.py) is run (running.py) by providers (providers.py; folding.py and jax_model.py are two of them): gated (gate.py),
then timed (measuring/). Rows (rows.py) hold what was found beside what the machine allows (roofline.py, graph.py), as text
(report.py), pictures (pictures.py) or against an earlier run (compare.py).
"""
