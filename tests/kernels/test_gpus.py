"""GPUs by their names."""

from __future__ import annotations

import pytest

from cnnfast_kernels import gpus, tables


@pytest.mark.parametrize("gpu", gpus.KNOWN, ids=lambda gpu: gpu.name)
def test_a_gpu_is_found_by_either_name(gpu):
    for text in (gpu.name, gpu.name.upper(), gpu.cuda, gpu.cuda.lower()):
        assert gpus.named(text) is gpu
    assert gpu.arch in gpus.SHARED_LIMITS
    assert tables.slug(gpu.cuda, gpu.arch).startswith("nvidia-")


def test_names_are_distinct():
    assert len({gpu.name for gpu in gpus.KNOWN}) == len({gpu.cuda for gpu in gpus.KNOWN}) == len(gpus.KNOWN)


@pytest.mark.parametrize("text", ["h2000", "", "nvidia", "rtx 4090"])
def test_an_unknown_one_is_told_what_there_is(text):
    with pytest.raises(ValueError, match=f"{text!r} is none of b200, h200, h100, a100, l40s, rtx-4090, rtx-3090"):
        gpus.named(text)


def test_shared_memory_of_a_program_is_what_triton_was_told():
    """A multiprocessor's, but for the kilobyte that CUDA keeps."""
    known = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
    assert known == gpus.SHARED_LIMITS


@pytest.mark.parametrize(
    ("name", "half", "tf32", "ieee", "fp64"),
    [  # TFLOPS at the clock of the data sheet, dense
        ("h100", 989.4, 494.7, 66.9, 66.9),
        ("a100", 312, 156, 19.5, 19.5),
        ("l40s", 362.05, 183, 91.6, 1.431),
        ("rtx-4090", 165.2, 82.6, 82.6, 1.29),
        ("rtx-3090", 71, 35.6, 35.6, 0.556),
        ("b200", 2250, 1125, 75, 37),
    ],
)
def test_rates_are_those_of_the_data_sheets(name, half, tf32, ieee, fp64):
    """At clocks that differ, of a data sheet's matrix units, its lanes and here: within an eighth."""
    gpu = gpus.named(name)
    clock = 1.83e9 if name == "h100" else gpu.clock
    for precision, teraflops in (("half", half), ("tf32", tf32), ("ieee", ieee), ("fp64", fp64)):
        rate = gpu.multiprocessors * clock * getattr(gpu.rates, precision)
        assert rate == pytest.approx(teraflops * 1e12, rel=0.125)
        assert gpu.flops(precision) == pytest.approx(rate * gpu.sustained * gpu.clock / clock)


def test_nothing_is_reached_that_a_data_sheet_does_not_promise():
    promised = {"h200": 4.8, "h100": 3.35, "a100": 2.04, "l40s": 0.864, "rtx-4090": 1.008, "rtx-3090": 0.936, "b200": 8}
    for gpu in gpus.KNOWN:
        assert 0.8 * promised[gpu.name] <= gpu.memory / 1e12 <= promised[gpu.name]
        assert gpu.memory < gpu.cache <= gpu.multiprocessors * gpus.CACHE_CLOCK * gpu.clock
        assert 0 < gpu.sustained <= 1


@pytest.mark.parametrize(
    ("cuda", "arch", "like"),
    [
        ("NVIDIA H200", 90, "h200"),
        ("NVIDIA GeForce RTX 4090", 89, "rtx-4090"),
        ("NVIDIA GH200 480GB", 90, "h200"),
        ("NVIDIA B300", 103, "b200"),
        ("NVIDIA GeForce RTX 5090", 120, "l40s"),
        ("Orin", 87, "rtx-3090"),
        ("NVIDIA A100-PCIE-40GB", 80, "a100"),
        ("Tesla T4", 75, "a100"),
        ("NVIDIA X1000", 130, "b200"),
    ],
)
def test_a_gpu_that_is_not_known_has_the_numbers_of_its_like(cuda, arch, like):
    found, known = gpus.stand_in(cuda, arch), gpus.named(like)
    assert found.cuda == cuda
    assert found[3:] == known[3:]
    assert found.arch == (arch if arch in gpus.MULTIPROCESSORS else known.arch)
