"""What is refused of the process before any work."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from ptq.core.formats import NVFP4
from ptq.methods.gptq import gptq
from ptq.models.adapter import ModelAdapter
from ptq.run.loop import quantize_model
from ptq.run.recipe import Recipe
from ptq.runtime.checks import check_float32

from .conftest import PYTHONPATH
from .tiny import tiny_model


def cuda_tf32() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def cpu_bfloat16() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@pytest.fixture
def highest() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        cuda_tf32,
        cpu_bfloat16,
    ],
    ids=["high", "medium", "allow_tf32", "cuda", "cpu"],
)
def test_float32_products_of_less_than_float32_are_refused(highest, change: Callable[[], None]):
    check_float32()
    change()
    remedy = r"precision.* is '.*call torch.set_float32_matmul_precision\('highest'\)"
    with pytest.raises(ValueError, match=remedy):
        check_float32()
    with pytest.raises(ValueError, match=remedy):
        gptq(torch.randn(4, 16), torch.eye(16), NVFP4, tensor_scale=torch.ones(()))
    with pytest.raises(ValueError, match=remedy):
        next(quantize_model(ModelAdapter(tiny_model()), Recipe(method="rtn", rule="absmax")))
    torch.set_float32_matmul_precision("highest")  # the remedy is one, whatever the setting was
    check_float32()


def test_the_variable_that_containers_set_is_refused():
    code = "from ptq.runtime.checks import check_float32; check_float32()"
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode and "unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" in done.stderr
