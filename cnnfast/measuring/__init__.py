"""What bench, tune and the demo measure with: steps that take turns on a clock (timing.py), over buffers that take
turns (rotation.py), as CUDA graphs (graphs.py), within a budget (budget.py); what is asked after a step that raised
(failing.py); the machine that a run is made on (machine.py), and how much of it there is to have (load.py).
"""
