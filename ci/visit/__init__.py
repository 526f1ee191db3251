"""A visit: a GPU is at hand for fifteen minutes. ci/gpu.sh runs this package; `--plan` says beforehand what it will
take.

parts.py says what is run, running.py runs it to its limits, visiting.py goes from part to part, results.py leaves the
files, plan.py counts what all of it costs. smoke/ holds one child process for each family of kernels; pytest_lines.py
writes down tests one by one.
"""
