"""How float32 is multiplied: PyTorch's settings while the context lasts and afterwards, our kernels', and names of
dtypes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cnnfast
import cnnfast.functional as F
from cnnfast import dtypes
from cnnfast.precision import allow_tf32, float32_products

BACKENDS: Any = torch.backends
# What somebody may have done to PyTorch's settings before, in a process of its own: some of it cannot be undone.
BEFORE = {
    "nothing": "",
    "the newer ones": 'B.cudnn.conv.fp32_precision = "ieee"; B.cuda.matmul.fp32_precision = "tf32"',
    "the newer one of a library": 'B.cudnn.fp32_precision = "tf32"',
    "the newest of all": 'B.fp32_precision = "tf32"',
    "the older ones": 'torch.set_float32_matmul_precision("high"); B.cudnn.allow_tf32 = False',
    "both": 'B.cuda.matmul.fp32_precision = "tf32"; B.cudnn.allow_tf32 = False',
}
REPORT = """
import json
import torch
from cnnfast.precision import float32_products
B = torch.backends

def legacy(read):
    try:
        return read()
    except RuntimeError:
        return "raises"

def settings():
    settings = (B.cudnn.conv, B.cudnn.rnn, B.cuda.matmul, B.mkldnn.conv, B.mkldnn.matmul, B.cudnn, B)
    of_each = [setting.fp32_precision for setting in settings]
    older = (lambda: B.cudnn.allow_tf32, lambda: B.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision)
    return [of_each, [legacy(read) for read in older]]

BEFORE
before, during = settings(), {}
for products in ("ieee", "tf32"):
    with float32_products(products):
        during[products] = settings()
        with float32_products("ieee"):
            pass
        assert settings() == during[products]
after = settings()
B.fp32_precision = "ieee"
print(json.dumps([before, during, after, B.cudnn.conv.fp32_precision]))
"""


@pytest.mark.parametrize("name", BEFORE)
def test_settings_hold_and_are_put_back(name):
    script = REPORT.replace("BEFORE\n", BEFORE[name] + "\n")
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    before, during, after, later = json.loads(child.stdout)
    assert after == before
    for products, (each, older) in during.items():
        assert set(each[:5]) == {products}
        if before[1][2] != "raises":  # torch.compile reads it
            assert older[2] == {"ieee": "highest", "tf32": "high"}[products]
    if name in ("nothing", "the newest of all"):
        assert later == "ieee", "the general setting still reaches convolutions"


def test_what_the_settings_say_on_a_gpu_holds_and_on_a_cpu_only_what_is_asked_for():
    on_gpu, on_cpu = (SimpleNamespace(dtype=torch.float32, is_cuda=is_cuda, is_meta=False) for is_cuda in (True, False))
    setting, before = BACKENDS.cudnn.conv, BACKENDS.cudnn.conv.fp32_precision
    try:
        for value in ("ieee", "tf32"):
            setting.fp32_precision = value
            assert [allow_tf32(x) for x in (on_gpu, on_cpu)] == [value == "tf32", False]
    finally:
        setting.fp32_precision = before
    for products in ("ieee", "tf32"):
        with float32_products(products):
            assert [allow_tf32(x) for x in (on_gpu, on_cpu)] == [products == "tf32"] * 2
            assert not allow_tf32(torch.zeros(1, dtype=torch.float16))
    assert not allow_tf32(on_cpu)


def test_operators_follow_forward_and_backward(device):
    x, w = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        for shape in ((2, 4, 5, 5), (6, 4, 3, 3))
    )
    found = {}
    for products in ("ieee", "tf32"):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        with float32_products(products):
            y = F.conv2d(a, b)
            found[products] = [y.detach(), *torch.autograd.grad(y, (a, b), torch.cos(y).detach())]
    for ieee, tf32 in zip(*found.values(), strict=True):
        assert 1e-5 < (ieee - tf32).abs().max() < 0.1


def test_tests_run_in_ieee():
    """conftest.py: on a GPU convolutions would be TF32."""
    assert "tf32" not in (BACKENDS.cudnn.conv.fp32_precision, BACKENDS.cuda.matmul.fp32_precision)
    assert not BACKENDS.cudnn.allow_tf32
    assert not BACKENDS.cuda.matmul.allow_tf32


# ----------------------------------------------------------------------------------------------------------------------
# Names


def test_names_of_dtypes():
    short = {name: dtypes.full_name(name) for name in ("bf16", "fp16", "fp32", "tf32", "fp64")}
    assert short == {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "tf32", "fp64": "float64"}
    for name in ("bfloat16", "torch.bfloat16", "half", "float", "double", "torch.double"):
        assert dtypes.dtype_of(dtypes.full_name(name)) is getattr(torch, name.removeprefix("torch."))
    assert dtypes.dtype_of("tf32") is torch.float32
    assert [dtypes.name_of(torch.float32, tf32) for tf32 in (False, True)] == ["float32", "tf32"]
    assert dtypes.name_of(torch.float16, tf32=True) == "float16"


@pytest.mark.parametrize("name", ["int8", "float33", "", "Tensor", "nn"])
def test_unknown_names_are_answered_with_the_choices(name):
    with pytest.raises(
        ValueError, match=f"{name!r} is none of bf16, fp16, fp32, tf32, fp64, bfloat16, float16, float32, float64"
    ):
        dtypes.full_name(name)


@pytest.mark.parametrize("name", ["fp32", "tf32", "fp64", "half", "torch.float32"])
def test_check_takes_every_name(name, device):
    expected = dtypes.full_name(name)
    report = cnnfast.check(lambda x: F.avg_pool2d(x, 2), torch.rand(1, 2, 4, 4, device=device), dtype=name)
    assert [(row.dtype, row.verdict) for row in report.rows] == [(expected, "ok")]
