"""One method a file, all with one signature: `(W, H, format, *, rule, tensor_scale, damp) -> Solution`."""

from collections.abc import Callable

from ptq.methods.gptq import gptq
from ptq.methods.rtn import rtn
from ptq.methods.solution import Solution

METHODS: dict[str, Callable[..., Solution]] = {"rtn": rtn, "gptq": gptq}
