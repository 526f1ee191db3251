"""What cnnfast is worth on this machine: models and layers against the strongest baselines, with the roofline, losses
first.

A job says what is measured (job.py, shapes.py, numbers.py), and a task is a job with those who do it (task.py). A
series (series.py) runs one task after the other (running.py). Each provider (providers.py; folding.py, jax_model.py and
engines.py are some of them) has its kernels compiled ahead (ahead.py, layers_ahead.py), is judged before it is timed
(gate.py), is timed (cnnfast/measuring), and is asked for its memory and its kernels (footprint.py), all in the same
surroundings (surroundings.py). Rows (rows.py) hold what was found beside what the machine allows (roofline.py,
graph.py). They are printed (report.py), drawn (pictures.py), and compared with an earlier run (compare.py).

A task may also be augmentation, of a batch of images (augmentation.py), by its own providers (augmenters.py), whose
launches are counted (counting.py); step_counts.py counts those of a training step, and training_traffic.py what it
moves and keeps beside PyTorch's.

host_cost.py is apart from all that: what the host's part of a call costs, without a GPU.
"""

# The providers, in the order in which they run (providers.py), for who needs no more of them, and no torch.
NAMES = (
    *("eager", "eager-graph", "cudnn-fused", "cudnn-graph", "cnnfast", "cnnfast-graph", "cnnfast-kernels"),
    *("nchw", "frozen", "onnxruntime", "openvino", "jax", "compile", "cnnfast-compile", "compile-freezing"),
    "max-autotune",
)
# The word that stands for augmentation where a model is named, and its providers (augmenters.py).
AUGMENT = "augment"
AUGMENTERS = (
    *("cnnfast", "cnnfast-drawn", "cnnfast-torch", "torchvision", "torchvision-worker", "torchvision-batch"),
    *("kornia", "kornia-resample", "kornia-compile"),
)
