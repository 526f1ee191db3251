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
