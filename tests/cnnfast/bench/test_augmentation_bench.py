"""`cnnfast bench augment`: who passes the gate, what is counted, and what a machine without some library is told."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import cnnfast
from cnnfast import bench
from cnnfast.__main__ import app
from cnnfast.bench.augmentation import JUDGED, LIGHT, ONE_PASS, RECIPES, ROTATED, USUAL, Recipe, augmentation_task
from cnnfast.bench.augmenters import AUGMENTERS, Augmenter
from cnnfast.bench.counting import Count, by_operators, by_replaying
from cnnfast.bench.rows import OK, UNAVAILABLE, WRONG, read, speedup
from cnnfast.bench.running import run
from cnnfast.measuring.machine import Machine, Peaks
from cnnfast.torchvision_import import torchvision

MACHINE, PEAKS = Machine("a CPU", "", "", "2.13", "", "", "abc"), Peaks(1e11, 1e10)
SIZE, BATCH = 21, 3
IMAGES = (BATCH, 3, 26, 30)
PRESENT = ("cnnfast", "cnnfast-drawn", "torchvision", "torchvision-batch")
KORNIA = ("kornia", "kornia-resample")
NAMES = {recipe: recipe.name for recipe in RECIPES}

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)
by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=NAMES.get)


@pytest.fixture(autouse=True)
def served_by_torch():
    with cnnfast.backend("torch"):
        yield


def rows(recipe: Recipe, *providers: Augmenter | str, images=IMAGES, dtype=torch.float32, device="cpu") -> dict:
    chosen = [AUGMENTERS[each] if isinstance(each, str) else each for each in providers]
    task = augmentation_task(recipe, images, SIZE, dtype, torch.device(device), chosen)
    return {row.provider: row for row in run(task, MACHINE, PEAKS, seconds=0)}


def statuses(found: dict) -> dict:
    return {name: (row.status, row.reason) for name, row in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The gate


@needs_torchvision
@by_recipe
def test_all_that_is_installed_passes_the_gate(recipe, device):
    found = rows(recipe, *PRESENT, device=device)
    assert statuses(found) == dict.fromkeys(PRESENT, (OK, ""))
    assert found["cnnfast"].error < 1e-4
    assert found["torchvision"].error < 0.02  # which rounds to uint8 between its steps


@needs_torchvision
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_of_adjacent_channels_to_half_precision(dtype, device):
    found = rows(ROTATED, *PRESENT, images=(BATCH, 26, 30, 3), dtype=dtype, device=device)
    assert statuses(found) == dict.fromkeys(PRESENT, (OK, ""))
    assert {row.dtype for row in found.values()} == {str(dtype).removeprefix("torch.")}
    assert {row.input for row in found.values()} == {"3x26x30x3 to 21x21"}


def test_our_kernels_pass_the_gate(device):
    pytest.importorskip("triton")
    provider = AUGMENTERS["cnnfast"]
    task = augmentation_task(USUAL, IMAGES, SIZE, torch.float32, device, [provider])
    with cnnfast.backend("kernels"), cnnfast.trace() as calls:
        results = provider.judged(task.job)
    assert provider.judge(task.expected(task.job), results).message == ""
    assert {call.served_by for call in calls} == {"kernels"}
    assert len(calls) == len(USUAL.pinned()) + 1


class Changed(type(AUGMENTERS["cnnfast"])):
    """cnnfast by a recipe that differs from the one that was asked for, judged as others are: without the batch whose
    numbers it draws.
    """

    judged, judge = Augmenter.judged, Augmenter.judge

    def transform(self, recipe, job):
        return super().transform(replace(recipe, **self.differences(recipe)), job)

    def differences(self, recipe: Recipe) -> dict:
        raise NotImplementedError


WRONG_STEPS = {
    "no flip": lambda recipe: {"horizontal_flip_p": 0.0},
    "a darker image": lambda recipe: {"brightness": (0.699, 0.699)} if recipe.brightness else {},
    "less contrast": lambda recipe: {"contrast": (1.299, 1.299)} if recipe.contrast else {},
    "pale": lambda recipe: {"saturation": (0.601, 0.601)} if recipe.saturation else {},
    "another hue": lambda recipe: {"hue": (0.0801, 0.0801)} if recipe.hue else {},
    "never grey": lambda recipe: {"grayscale_p": 0.0},
    "turned the other way": lambda recipe: {"degrees": (-20.0, -20.0)} if recipe.degrees else {},
}


@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_each_step_is_judged(wrong, device):
    provider = type("Wrong", (Changed,), {"differences": staticmethod(WRONG_STEPS[wrong])})("cnnfast", "")
    assert rows(ROTATED, provider, device=device)["cnnfast"].status == WRONG


def test_our_boxes_and_crops_are_judged_by_the_numbers_that_are_drawn(device):
    class Ours(type(AUGMENTERS["cnnfast"])):
        def transform(self, recipe, job):
            return super().transform(replace(recipe, **different), job)

    recipe = replace(USUAL, erasing_p=1.0)  # a box in each of the few images
    for different, status in (({}, OK), ({"erasing_p": 0.0}, WRONG), ({"crop_scale": (0.079, 1.0)}, WRONG)):
        assert rows(recipe, Ours("cnnfast", ""), device=device)["cnnfast"].status == status, different


@pytest.mark.parametrize("wrong", ["another shape", "another dtype", "not finite"])
def test_what_is_timed_has_the_right_shape_and_is_finite(wrong, device):
    class Wrong(type(AUGMENTERS["cnnfast"])):
        def transform(self, recipe, job):
            augment = super().transform(recipe, job)
            made = {
                "another shape": lambda *a, **k: augment(*a, **k)[:, :, 1:],
                "another dtype": lambda *a, **k: augment(*a, **k).double(),
                "not finite": lambda *a, **k: augment(*a, **k) * torch.nan,
            }
            return made[wrong]

    row = rows(LIGHT, Wrong("cnnfast", ""), device=device)["cnnfast"]
    assert (row.status, row.median) == ("failed", None)
    assert "its batch is" in row.reason


@needs_torchvision
@pytest.mark.cpu_tensors("a worker's images lie on the CPU")
def test_a_worker_computes_by_one_thread(monkeypatch):
    job = augmentation_task(LIGHT, IMAGES, SIZE, torch.float32, torch.device("cpu"), []).job
    transform = AUGMENTERS["torchvision-worker"].transform(LIGHT, job)
    seen, stack, threads = [], torch.stack, torch.get_num_threads()
    monkeypatch.setattr(torch, "stack", lambda images: (seen.append(torch.get_num_threads()), stack(images))[1])
    torch.set_num_threads(2)
    try:
        assert transform(job.images()).shape == (BATCH, 3, SIZE, SIZE)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------------------------------
# kornia


def test_kornia_passes_the_gate_where_it_is_installed(device):
    pytest.importorskip("kornia", reason="kornia is not installed")
    for recipe in RECIPES:
        assert statuses(rows(recipe, *KORNIA, device=device)) == dict.fromkeys(KORNIA, (OK, ""))


@pytest.fixture
def without_kornia(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "kornia" else found(name, *rest)
    )


def test_a_machine_without_kornia_is_told_how_to_install_it(without_kornia):
    found = rows(LIGHT, "cnnfast", "kornia", "kornia-resample")
    told = (UNAVAILABLE, "kornia is not installed: pip install kornia")
    assert statuses(found) == {"cnnfast": (OK, ""), "kornia": told, "kornia-resample": told}
    result = command("--provider", "kornia")
    assert result.exit_code == 2
    assert "kornia cannot run: kornia is not installed: pip install kornia" in words(result.output)


class ImageByImage(nn.Module):
    """In the place of one of kornia's transforms: torchvision's, on floating images, one by one."""

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.one = one

    def forward(self, images):
        assert images.is_floating_point()
        return torch.stack([self.one(image) for image in images])


@pytest.fixture
def stand_in(monkeypatch) -> list[str]:
    """A package of kornia's name, made of torchvision, and what was asked of it."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    torchvision()
    from torchvision.transforms import v2

    asked: list[str] = []

    def crop(size, scale, ratio, *, align_corners, cropping_mode):
        asked.append(cropping_mode)
        return ImageByImage(v2.RandomResizedCrop(size, scale, ratio, antialias=False))

    def sequential(*steps, data_keys, same_on_batch):
        assert (data_keys, same_on_batch) == (["input"], False)
        return nn.Sequential(*steps)

    bilinear = v2.InterpolationMode.BILINEAR
    made = ModuleType("kornia.augmentation")
    vars(made).update(
        RandomResizedCrop=crop,
        RandomHorizontalFlip=lambda *, p: ImageByImage(v2.RandomHorizontalFlip(p)),
        RandomAffine=lambda degrees, *, p: ImageByImage(v2.RandomAffine(degrees, interpolation=bilinear)),
        ColorJitter=lambda *colours, p: ImageByImage(v2.ColorJitter(*(each or None for each in colours))),
        RandomGrayscale=lambda *, p: ImageByImage(v2.RandomGrayscale(p)),
        RandomErasing=lambda *, p: ImageByImage(v2.RandomErasing(p)),
        Normalize=lambda mean, std: ImageByImage(v2.Normalize(mean, std)),
        AugmentationSequential=sequential,
    )
    package = ModuleType("kornia")
    package.__path__ = []
    package.__spec__ = importlib.util.spec_from_loader("kornia", None)
    monkeypatch.setitem(sys.modules, "kornia", package)
    monkeypatch.setitem(sys.modules, "kornia.augmentation", made)
    return asked


@by_recipe
def test_kornia_is_called_with_the_options_of_the_recipe(recipe, stand_in, device):
    assert statuses(rows(recipe, *KORNIA, device=device)) == dict.fromkeys(KORNIA, (OK, ""))
    assert set(stand_in) == {"slice", "resample"}


def test_a_resize_of_another_convention_is_not_judged(stand_in, monkeypatch, device):
    """And of one that says nothing of that it is."""
    resized = []

    def crop(size, scale, ratio, **mode):
        resized.append(mode["cropping_mode"])
        return lambda images: nn.functional.interpolate(images, size, mode="bilinear", align_corners=True)

    made = sys.modules["kornia.augmentation"]
    monkeypatch.setattr(made, "RandomResizedCrop", crop)
    monkeypatch.setattr(
        made, "AugmentationSequential", lambda *steps, **options: lambda x: [x := step(x) for step in steps][-1]
    )
    found = rows(LIGHT, *KORNIA, device=device)
    assert {name: row.status for name, row in found.items()} == {"kornia": WRONG, "kornia-resample": OK}


# ----------------------------------------------------------------------------------------------------------------------
# What is counted


def test_the_names_are_those_of_the_providers():
    assert tuple(AUGMENTERS) == bench.AUGMENTERS
    assert all(name == provider.name for name, provider in AUGMENTERS.items())


def test_operators_that_make_views_or_touch_no_image_are_not_counted(device):
    image, small = torch.zeros(3, 8, 8, device=device), torch.zeros(4, device=device)

    def step():
        seen = image.permute(1, 2, 0)[2:].flatten(0, 1)  # a view of 6 of 8 rows
        small.add_(1)
        other = seen * 2
        other.copy_(seen)
        other.mul_(2)
        torch.empty_like(image)

    whole = 6 * 8 * 3 * 4
    assert by_operators(step, 64) == Count(3, 2 * whole + 2 * whole + 2 * whole)
    assert by_operators(step, 6 * 8 * 3 + 1) == Count(0, 0)


def test_random_numbers_are_as_if_nothing_had_been_counted():
    torch.manual_seed(3)
    right = torch.rand(2)
    torch.manual_seed(3)
    by_operators(lambda: torch.rand(5), 1)
    by_replaying(lambda: torch.rand(5))
    assert torch.equal(torch.rand(2), right)


def test_one_launch_or_two_are_replayed_without_a_gpu():
    """The bytes are those of what each kernel is given: images, numbers, sums of grey images, results."""
    pytest.importorskip("triton")
    results = BATCH * 3 * SIZE**2 * 2
    images, maps = BATCH * 3 * 26 * 30, BATCH * 6 * 4
    light = rows(LIGHT, "cnnfast", dtype=torch.bfloat16)["cnnfast"]
    assert (light.launches, light.moved_bytes) == (1, images + maps + results)
    for recipe in (USUAL, ROTATED):
        row = rows(recipe, "cnnfast", dtype=torch.bfloat16)["cnnfast"]
        colours, sums, boxes = BATCH * 5 * 4, BATCH * 4, BATCH * 7 * 4
        assert (row.launches, row.moved_bytes) == (
            2,
            (images + maps + colours + sums) + (images + maps + colours + sums + boxes + results),
        )


def test_without_triton_the_operators_of_the_plain_path_are_counted(monkeypatch):
    monkeypatch.setattr("cnnfast.dispatch.launch", None)
    light, usual = (rows(recipe, "cnnfast")["cnnfast"].launches for recipe in (LIGHT, USUAL))
    assert 2 < light < usual


@needs_torchvision
def test_torchvision_launches_for_each_image():
    found = rows(USUAL, "torchvision", "torchvision-batch")
    assert found["torchvision"].launches > 2 * found["torchvision-batch"].launches > 20


def test_what_bandwidth_allows_is_to_read_images_once_and_to_write_results_once():
    row = rows(USUAL, "cnnfast", dtype=torch.bfloat16)["cnnfast"]
    assert row.bytes == BATCH * 3 * 26 * 30 + BATCH * 3 * SIZE**2 * 2
    assert row.level == ONE_PASS
    assert row.ceilings == {ONE_PASS: pytest.approx(row.bytes / PEAKS.bytes)}


def test_only_what_draws_its_numbers_for_each_image_is_compared():
    """Numbers that were drawn before cost us nothing, and one set for a batch costs torchvision less."""
    assert {name for name, each in AUGMENTERS.items() if each.ours} == {"cnnfast"}
    others = {name for name, each in AUGMENTERS.items() if not each.baseline}
    assert others == {"cnnfast", "cnnfast-drawn", "cnnfast-torch", "torchvision-batch"}


# ----------------------------------------------------------------------------------------------------------------------
# The command


def command_line(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def command(*arguments: str):
    return command_line("augment", "--seconds", "0", *arguments)


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@needs_torchvision
@pytest.mark.cpu_tensors("the command itself chooses the device")
def test_the_command_tells_and_writes_what_it_found(tmp_path, without_kornia):
    file = tmp_path / "rows.json"
    images = ("--input", "1x3x26x30", "--input", "1x26x30x3")
    result = command(*images, "--batch", "2", "--size", "21", "--dtype", "fp32", "--json", str(file))
    assert result.exit_code == 0, result.output
    found = read(file)
    assert {row.provider for row in found} == set(bench.AUGMENTERS)
    jobs = [(recipe.name, f"{images} to 21x21") for recipe in RECIPES for images in ("2x3x26x30", "2x26x30x3")]
    assert list(dict.fromkeys((row.subject, row.input) for row in found)) == jobs
    assert {(row.kind, row.mode, row.batch, row.dtype) for row in found} == {("augmentation", "augment", 2, "float32")}
    for data in json.loads(file.read_text()):
        assert (data["median"] is not None) == (data["launches"] is not None) == (data["status"] == OK)
    compared = words(command_line("--compare", str(file), str(file)).output)
    assert f"{len(found) - [row.status for row in found].count(UNAVAILABLE)} compared" in compared
    assert all(f"2x{extents} to 21x21, float32" in compared for extents in ("3x26x30", "26x30x3"))
    said = words(result.output)
    for text in (
        "augment: crop, flip, rotation, colours, erasing, batch 2, 2x26x30x3 to 21x21, float32",
        "kornia is not installed: pip install kornia",
        "one pass, which reads each image once and writes each result once",
        "are fewer than there are",
        f"all images by the same numbers: for reference only (torchvision {sys.modules['torchvision'].__version__})",
    ):
        assert text in said
    if not torch.cuda.is_available():
        assert "its launches are those of a GPU" in said
        assert "what conversion costs" not in said


@needs_torchvision
@pytest.mark.cpu_tensors("the command itself chooses the device")
def test_losses_to_those_who_do_the_same_come_first(tmp_path):
    file = tmp_path / "rows.json"
    names = ("cnnfast", "cnnfast-drawn", "torchvision", "torchvision-batch")
    chosen = [f"--provider={name}" for name in names]
    result = command("--input", "2x3x26x30", "--size", "21", "--json", str(file), *chosen)
    assert result.exit_code == 0, result.output
    light = {row.provider: row for row in read(file) if row.subject == LIGHT.name}
    assert speedup(list(light.values())) == light["torchvision"].median / light["cnnfast"].median
    verdicts = [line.split()[0] for line in result.output.splitlines() if line.startswith(("loses", "wins", "even"))]
    assert len(verdicts) == len(RECIPES)
    assert result.output.index(verdicts[0]) < result.output.index("provider ")


def test_the_help_says_what_augment_is():
    said = words(CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "80", "TERM": "dumb"}).output)
    for text in ("the word augment", "--size PIXELS", "kornia-resample", "cnnfast bench augment --batch 64 --size 224"):
        assert text in said


def test_images_that_are_judged_are_no_more_than_a_batch_has(device):
    assert statuses(rows(ROTATED, "cnnfast", images=(1, 3, 26, 30), device=device)) == {"cnnfast": (OK, "")}
    assert JUDGED > 1
