"""`cnnfast predict`: what is in images, by a frozen network."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..spelling import did_you_mean
from . import options
from .console import (
    STANDARD_OUTPUT,
    JsonFile,
    exit_code,
    interruptible,
    printer,
    progress,
    refuse_unwritable,
    refused_by,
    table,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine import Frozen
    from ..engine.images.images import Found
    from ..engine.images.predicting import Prediction
    from ..engine.images.preprocessing import Preprocessing

EXAMPLES = (
    "cnnfast predict model.cnnfast cat.jpg",
    "cnnfast predict model.cnnfast photos --batch 32 --csv predictions.csv",
    "cnnfast predict model.cnnfast photos --top 1 --json -",
)
IMAGES = "Images"
OF_A_RUN = "model.cnnfast"  # what a run leaves in its folder when it is over
# With more images each has one line, and beyond so many lines the files of --csv and --json tell the rest.
FEW_IMAGES, MOST_LINES = 20, 200
COLUMNS = ("file", "rank", "class", "name", "probability", "error")


def predict(
    model: Annotated[
        Path,
        typer.Argument(
            help="A frozen network: the file that `cnnfast freeze` wrote, or the folder of a run of `cnnfast train`.",
            metavar="NETWORK",
            show_default=False,
        ),
    ],
    places: Annotated[
        list[Path],
        typer.Argument(
            help="Images, and folders, in which images are searched for, in their folders too.",
            metavar="IMAGE|FOLDER",
            show_default=False,
        ),
    ],
    preprocessing: Annotated[
        str,
        typer.Option(
            help="How images are prepared: a JSON file with size, crop, interpolation, mean and std, weights of "
            "torchvision, such as ResNet50_Weights.IMAGENET1K_V2, or timm:NAME.",
            metavar="HOW",
            show_default="what NETWORK has",
            rich_help_panel=IMAGES,
        ),
    ] = "",
    classes: Annotated[
        str,
        typer.Option(
            help="Names of the classes: a text file with a name in each line, or weights of torchvision.",
            metavar="NAMES",
            show_default="what NETWORK has",
            rich_help_panel=IMAGES,
        ),
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.", metavar="N", rich_help_panel=IMAGES)] = 8,
    top: Annotated[
        int, typer.Option(min=1, help="How many classes each image has.", metavar="K", rich_help_panel=options.OUTPUT)
    ] = 5,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            help="Write the results to this file too, as CSV, a line for each prediction; - is standard output.",
            metavar="FILE",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Name the most probable classes of images, by a frozen network.

    Images are prepared as NETWORK says, which has it from `cnnfast freeze`, and turned upright as the camera noted.
    Probabilities are the softmax of the network's result, or the result itself if it holds probabilities already.

    In a folder, files are images if their extension is one that Pillow reads; hidden files are left out. An image that
    cannot be read is named with the reason and left out, and the exit code is then 1. Ctrl-C and SIGTERM end the work
    with what is done, and exit code 130 or 143.
    """
    if csv_file == json_file == STANDARD_OUTPUT:
        raise typer.BadParameter(
            "standard output can take the CSV or the JSON: write one to a file", param_hint="--csv"
        )
    refuse_unwritable(csv_file, "--csv")
    refuse_unwritable(json_file)
    if model.is_dir():
        model = model / OF_A_RUN
    if not model.is_file():
        raise typer.BadParameter(f"there is no file {model}{_advice(model)}", param_hint="NETWORK")

    from ..engine.images.images import find

    with refused_by("IMAGE", FileNotFoundError, ModuleNotFoundError):
        found = find(places)
    if not found.files and not found.unreadable:
        raise typer.BadParameter(_no_image(found), param_hint="IMAGE")
    network = _load(model)
    how, names = _surroundings(network, model, preprocessing, classes)
    done, code = _predictions(network, model, how, names, found, batch=batch, top=top)
    console = printer(STANDARD_OUTPUT if STANDARD_OUTPUT in (csv_file, json_file) else None)
    _show(done, len(found.files), names, console)
    if code:
        console.print("Interrupted: the rest was not looked at.")
    write_csv(csv_file, done, names)
    write_json(json_file, [_as_json(one, names) for one in done])
    raise typer.Exit(code or int(any(one.error for one in done)))


def _advice(model: Path) -> str:
    """What would help, where there is no such file."""
    if not model.suffix:
        return f": freeze a model first, by cnnfast freeze {model} --out {model}.cnnfast"
    return did_you_mean(str(model), map(str, model.parent.glob("*.cnnfast")))


def _no_image(found: Found) -> str:
    if not found.others:
        return "there is no file in there"
    most = sorted(found.others, key=found.others.__getitem__, reverse=True)[:5]
    kinds = ", ".join(kind or "no extension" for kind in most)
    return f"no file in there has the extension of an image that Pillow reads; there are files with {kinds}"


# ----------------------------------------------------------------------------------------------------------------------
# Work


def _load(file: Path) -> Frozen:
    from .. import engine

    with refused_by("NETWORK", OSError, ValueError):
        return engine.load(file)


def _surroundings(
    network: Frozen, file: Path, preprocessing: str, classes: str
) -> tuple[Preprocessing, tuple[str, ...] | None]:
    """How images are prepared, and the names of classes: what was asked for, or else what the file has."""
    from ..engine.images.classes import classes_of
    from ..engine.images.preprocessing import Preprocessing

    with refused_by("--preprocessing", ValueError):
        how = Preprocessing.of(preprocessing) if preprocessing else network.preprocessing
        if how is None:
            raise ValueError(
                f"{file} does not say how images are prepared for it. Give it here, such as --preprocessing "
                "ResNet50_Weights.IMAGENET1K_V2 or a JSON file, or to cnnfast freeze, which keeps it in the file"
            )
        how.check_sizes(network.network)
    with refused_by("--classes", ValueError):
        return how, classes_of(classes) if classes else network.classes


def _predictions(
    network: Frozen,
    file: Path,
    how: Preprocessing,
    names: Sequence[str] | None,
    found: Found,
    *,
    batch: int,
    top: int,
) -> tuple[list[Prediction], int]:
    """What was predicted, or was until an interrupt, and the exit code of that."""
    from ..engine.images.predicting import NoClasses, OtherClasses, Prediction
    from ..engine.images.predicting import predict as predictions

    done = [Prediction(folder, error=why) for folder, why in found.unreadable.items()]
    count = len(names) if names else None
    try:
        with interruptible(), progress("images") as tell, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # what matters of an image is told in its line
            tell(0, len(found.files))
            with closing(predictions(network, how, found.files, batch=batch, top=top, classes=count)) as groups:
                for group in groups:
                    done += group
                    tell(len(done), len(found.files))
    except KeyboardInterrupt as interrupt:
        return done, exit_code(interrupt)
    except OtherClasses as error:
        raise typer.BadParameter(str(error), param_hint="--classes") from None
    except NoClasses as error:
        python = f"network = cnnfast.load({str(file)!r}); network(network.preprocessing.apply(image)[None])"
        raise typer.BadParameter(f"{error}. Call it in Python: {python}", param_hint="NETWORK") from None
    return done, 0


# ----------------------------------------------------------------------------------------------------------------------
# Results


def _show(done: Sequence[Prediction], asked: int, names: Sequence[str] | None, console: Console) -> None:
    """Tables and sentences. asked: how many images there were to do."""
    from rich.text import Text

    read = [one for one in done if one.top]
    broken = [one for one in done if one.error]
    shown = table(("image", "class", "probability"), right={"probability"})
    for one in read[:MOST_LINES]:
        top = one.top if len(read) <= FEW_IMAGES else one.top[:1]
        for i, (index, probability) in enumerate(top):
            file = printable(str(one.file)) if i == 0 else ""
            shown.add_row(Text(file), Text(printable(_name(index, names))), f"{probability:.1%}")
        if len(top) > 1:
            shown.add_section()
    if read:
        console.print(shown)
    for one in broken[:MOST_LINES]:
        console.print(
            Text.assemble((printable(str(one.file)), "bold red"), f": {printable(one.error)}"), soft_wrap=True
        )
    if len(read) > MOST_LINES or len(broken) > MOST_LINES:
        console.print(f"{MOST_LINES} lines of a kind are shown; --csv FILE and --json FILE have all.", highlight=False)
    if read and names is None:
        console.print("These classes have no names here: --classes NAMES gives them.", highlight=False)
    if asked > 1 or broken or not read:
        left_out = f", {len(broken):,} left out" if broken else ""
        console.print(f"{len(read):,} of {asked:,} images predicted{left_out}", highlight=False)


def _name(index: int, names: Sequence[str] | None) -> str:
    return names[index] if names else f"class {index}"


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor or change its colours: names come from files."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def write_csv(file: Path | None, done: Sequence[Prediction], names: Sequence[str] | None) -> None:
    """A line for each class of each image, and one with an error for an image that has none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in done:
        where = str(one.file).encode(errors="backslashreplace").decode()  # a name may hold bytes that are no text
        for rank, (index, probability) in enumerate(one.top, 1):
            writer.writerow((where, rank, index, names[index] if names else "", f"{probability:.6g}", ""))
        if one.error:
            writer.writerow((where, "", "", "", "", one.error))
    write_text(file, text.getvalue().removesuffix("\n"))


def _as_json(one: Prediction, names: Sequence[str] | None) -> dict[str, Any]:
    top = [
        {"class": index, "name": names[index] if names else None, "probability": probability}
        for index, probability in one.top
    ]
    return {"file": str(one.file), "top": top, "error": one.error or None}
