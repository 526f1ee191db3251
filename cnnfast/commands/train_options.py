"""The options of `cnnfast train`, in the order of its help. Their defaults stand with the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options

DIGITS, DIGIT_NET, USUAL = "digits", "cnnfast.demo.digits:DigitNet", "resnet18"
DIGIT_SIZE, SIZE, SMALL = 8, 224, 32  # pixels of a side
NETWORK, LEARNING, IMAGES, RUNNING = "Network", "Learning", "Images", "Running"
DATA_HELP = (
    "A folder with a folder of images for each class, a CSV with the columns file and label, or digits: scikit-learn's."
)

Data = Annotated[str, typer.Argument(help=DATA_HELP, metavar="DATA", show_default=False)]
Out = Annotated[Path, typer.Option(help="The folder of the run.", metavar="RUN", rich_help_panel=options.OUTPUT)]
ModelName = Annotated[
    str,
    typer.Option(
        help=options.MODEL_HELP,
        metavar="MODEL",
        show_default=f"{USUAL}; for digits {DIGIT_NET}",
        rich_help_panel=NETWORK,
    ),
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="Start from the published weights.", rich_help_panel=NETWORK)
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Start from the weights in this file, of safetensors or torch.save; what does not fit is listed.",
        metavar="FILE",
        show_default="random weights",
        rich_help_panel=NETWORK,
    ),
]
Freeze = Annotated[
    list[str] | None,
    typer.Option(
        help="A part that is not trained, such as layer1, or backbone: all but the head. Repeat it for several.",
        metavar="NAME",
        show_default="none",
        rich_help_panel=NETWORK,
    ),
]
Epochs = Annotated[
    int, typer.Option(min=1, help="How often each image is learnt from.", metavar="N", rich_help_panel=LEARNING)
]
Batch = Annotated[
    int, typer.Option(min=1, help="Images of a step, in each process.", metavar="N", rich_help_panel=LEARNING)
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="The largest learning rate.",
        metavar="RATE",
        show_default="0.004, for sgd 0.1; a tenth with weights that were trained",
        rich_help_panel=LEARNING,
    ),
]
OptimizerName = Annotated[str, typer.Option(metavar="adamw|adam|sgd", rich_help_panel=LEARNING)]
Schedule = Annotated[
    str,
    typer.Option(
        help="How the learning rate moves, batch by batch.", metavar="one-cycle|cosine", rich_help_panel=LEARNING
    ),
]
WeightDecay = Annotated[
    float,
    typer.Option(
        min=0,
        help="Of the weights of layers, not of norms and biases.",
        metavar="SHARE",
        rich_help_panel=LEARNING,
    ),
]
LabelSmoothing = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="What share of each label is spread over all classes.",
        metavar="SHARE",
        rich_help_panel=LEARNING,
    ),
]
Clip = Annotated[
    float | None,
    typer.Option(
        help="The largest norm of a step's gradients.",
        metavar="NORM",
        show_default="any",
        rich_help_panel=LEARNING,
    ),
]
Balanced = Annotated[
    bool,
    typer.Option("--balanced", help="Classes with few images count as much as others.", rich_help_panel=LEARNING),
]
Decay = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Decay of the moving average of the weights; 0: none.",
        metavar="DECAY",
        rich_help_panel=LEARNING,
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="End after so many epochs without a better one.",
        metavar="N",
        show_default="train to the end",
        rich_help_panel=LEARNING,
    ),
]
Mixed = Annotated[
    str,
    typer.Option(
        help="Mixed precision; fp16 on a GPU only.",
        metavar="bf16|fp16",
        show_default="none: float32",
        rich_help_panel=LEARNING,
    ),
]
Pixels = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Pixels of each side of what the network sees.",
        metavar="PIXELS",
        show_default=f"{SIZE}; for digits {DIGIT_SIZE}, or {SMALL} for other networks",
        rich_help_panel=IMAGES,
    ),
]
Augmentation = Annotated[
    list[str] | None,
    typer.Option(
        help="An option of cnnfast.nn.Augment, such as degrees=15; repeat it for several. `cnnfast augment` shows "
        "what they do.",
        metavar="NAME=VALUE",
        show_default="random resized crops and flips; for digits small shifts, turns and slants",
        rich_help_panel=IMAGES,
    ),
]
Validation = Annotated[
    str,
    typer.Option(
        help="The share of each class that is held out, or other images of the same classes, like DATA.",
        metavar="SHARE|DATA",
        rich_help_panel=IMAGES,
    ),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.", metavar="N", rich_help_panel=RUNNING)]
Devices = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="GPUs of this machine, or processes on its CPU. Under torchrun all that it starts.",
        metavar="N",
        show_default="one",
        rich_help_panel=RUNNING,
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, help="All random numbers follow from it.", metavar="N", rich_help_panel=RUNNING)
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the run in RUN after its last whole epoch, with the same options; a run that has none begins.",
        rich_help_panel=RUNNING,
    ),
]
