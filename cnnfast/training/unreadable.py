"""Which images of a set cannot be read, found before hours of training meet them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .samples import ImageSet, UnreadableSample

AT_ONCE = 256  # images between two calls of `on_checked`
FEW = 5  # of which a sentence tells the reason


def refuse_unreadable(
    images: ImageSet,
    indices: Tensor,
    workers: int = 0,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Raises ValueError that names the first few of these images that `check` finds, and says how many there are. tell:
    called with how many images have been looked at, and of how many.
    """
    found = check(images, workers, indices, lambda count: tell(count, len(indices)))
    if found:
        told = "; ".join(f"{error.file}: {error.reason}" for error in found[:FEW])
        more = f"; and {len(found) - FEW} more" if len(found) > FEW else ""
        raise ValueError(f"{len(found)} of {len(indices)} images cannot be read: {told}{more}")


def check(
    images: ImageSet,
    workers: int = 0,
    indices: Tensor | None = None,
    on_checked: Callable[[int], None] = lambda count: None,
) -> list[UnreadableSample]:
    """An error for each image that cannot be read, of all or of int64 `indices`, in their order; its `file` and
    `reason` say what is wrong, and its `number` which image of the set it is. Only headers are read: what is wrong with
    the pixels behind them, such as an end that is missing, shows when they are decoded. Of a set that is resized for
    evaluation, images that this would make too large are among the errors.

    workers: processes that do this; 0: this one. on_checked is called with how many images have been looked at.
    """
    found: list[UnreadableSample] = []
    order = range(len(images)) if indices is None else indices.tolist()
    looks = DataLoader(_Looks(images), batch_size=AT_ONCE, sampler=order, num_workers=workers, collate_fn=list)
    checked = 0
    for errors in looks:
        found += filter(None, errors)
        checked += len(errors)
        on_checked(checked)
    return found


class _Looks(Dataset[UnreadableSample | None]):
    """What a look at each image raises."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> UnreadableSample | None:
        try:
            self.images.look(i)
        except UnreadableSample as error:
            return error
        return None
