"""Names of the classes that the columns of a network's result stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .from_libraries import as_object, shortened, timm_cfg
from .preprocessing import Preprocessing

FORMS = (
    "a list of names; weights of torchvision, such as ResNet50_Weights.IMAGENET1K_V2; a mapping from 0, 1, 2 ... to "
    "names, as config.id2label of transformers; or a text file with a name in each line"
)


def classes_of(given: Any) -> tuple[str, ...]:
    """The names that `given` stands for, in the order of the columns; two classes may have the same. Raises ValueError
    that says what can be given.
    """
    if isinstance(given, str | Path) and not isinstance(named := as_object(given), str | Path):
        given = named
    if isinstance(given, str | Path):
        return _from_file(Path(given))
    meta = getattr(given, "meta", None)
    if isinstance(meta, Mapping):
        given = meta.get("categories", given)
    given = getattr(getattr(given, "config", given), "id2label", given)
    if isinstance(given, Mapping):
        given = _in_order(given)
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"classes={shortened(given)} is no list of names: give {FORMS}")
    for i, name in enumerate(given):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"classes: the name of class {i} is {name!r}, and must be a text that is not empty")
    return tuple(given)


def _in_order(given: Mapping[Any, Any]) -> list[Any] | Mapping[Any, Any]:
    """The values of a mapping from 0, 1, 2 ..., which a JSON file writes as texts. Anything else as it is."""
    try:
        by_number = {int(key): value for key, value in given.items()}
    except (TypeError, ValueError):
        return given
    return [by_number[i] for i in range(len(by_number))] if by_number.keys() == set(range(len(given))) else given


def _from_file(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except OSError as error:
        raise ValueError(f"the file of classes {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the file of classes {file} is no text in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"the file of classes {file} has no name in line {number}")
    if not lines:
        raise ValueError(f"the file of classes {file} is empty")
    return tuple(line.strip() for line in lines)


def found_on(model: nn.Module) -> tuple[Preprocessing | None, tuple[str, ...] | None]:
    """What a model carries of both: models of timm have a pretrained_cfg, and those of transformers a config with names
    of classes. None for what is not there, or cannot be read.
    """
    preprocessing, classes = None, None
    cfg = timm_cfg(model)
    if cfg is not None:
        preprocessing = _or_none(Preprocessing.of, cfg)
        names, described = cfg.get("label_names"), cfg.get("label_descriptions") or {}
        classes = _or_none(classes_of, [described.get(name, name) for name in names]) if names else None
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(labels, Mapping) and any(label != f"LABEL_{i}" for i, label in labels.items()):
        classes = _or_none(classes_of, labels)
    return preprocessing, classes


def _or_none(read: Any, given: Any) -> Any:
    try:
        return read(given)
    except ValueError:
        return None
