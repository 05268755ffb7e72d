"""Times the kernels beside qwantize 0.1.1 (and ModelOpt's two sweeps) on the same data, after their tests have passed.

    python scripts/bench_kernels.py --output benchmarks [--modelopt DIR] [--sizes] [--only NAME ...]

Rows are appended to OUTPUT/kernels.csv.  `floor_ms` is what the bytes or the arithmetic counted in docs/kernels.md take at the
rates below.  DIR holds an unpacked nvidia-modelopt wheel; its two kernels are launched as its own wrappers do.
"""

import argparse
import csv
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import torch
import triton
from torch import Tensor

from ptq.calibrate.hessian import add_lower, mirror
from ptq.core.formats import E4M3, INT4_G128, MXFP4, NVFP4, choose_tensor_scale, scale_values
from ptq.core.linalg import damped, inverse_factor
from ptq.functional import nvfp4_optimal_hessian
from ptq.kernels import hessian, quantize, search
from ptq.kernels.sweep import sweep

ROWS, COLUMNS, TOKENS = 4096, 14336, 8192
# Measured on an H200: a device-to-device copy, bfloat16 matmul; and 132 SMs × 128 lanes × 1.98 GHz.
BYTES_PER_MS, BF16_PER_MS, LANES_PER_MS = 4.3e9, 790e9, 33.4e9
GPTQ_CASES = ((NVFP4, ("joint", "local", "mse", "absmax")), (MXFP4, ("joint", "local")), (INT4_G128, ("joint", "local")))
FIELDS = ["kernel", "provider", "shape", "dtype", "median_ms", "p20_ms", "p80_ms", "floor_ms", "gpu", "torch", "triton"]
FIELDS += ["commit"]

Case = tuple[str, str, str, str, float, Callable[[], object]]  # kernel, provider, shape, dtype, floor, call


def weights(rows: int, columns: int) -> Tensor:
    g = torch.Generator("cuda").manual_seed(0)
    return torch.randn(rows, columns, generator=g, device="cuda") * 0.02


def activations(tokens: int, columns: int) -> Tensor:
    """Correlated inputs of uneven channels, bfloat16: 0.8 · rank-512 + 0.6 · white, times exp(0.7 N(0, 1)) per channel."""
    g = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    X = 0.8 * (draw(tokens, 512) @ draw(512, columns)) / 512**0.5 + 0.6 * draw(tokens, columns)
    return (X * (0.7 * draw(columns)).exp()).bfloat16()


def search_cases(rows: int, columns: int, dtype: torch.dtype, modelopt: types.ModuleType | None) -> Iterator[Case]:
    W = weights(rows, columns).to(dtype)
    X = activations(2048, columns)
    H = hessian.block_hessian(X, 16) / len(X)
    ts, name = choose_tensor_scale(W, NVFP4), str(dtype).removeprefix("torch.")
    shape, n = f"{rows}x{columns}", W.numel()
    local, mse = n * (9 * 19.5 + 8 * 12) / LANES_PER_MS, n * 9 * 11 / LANES_PER_MS
    yield "search_local", "ptq", shape, name, local, lambda: search.search_scales(W, NVFP4, ts, search.prepare(H))
    yield "search_mse", "ptq", shape, name, mse, lambda: search.search_scales(W, NVFP4, ts)
    if dtype == torch.float32:
        yield from qwantize_searches(W, H, shape, local, mse)
    if modelopt is not None:
        yield from modelopt_searches(modelopt, W, H, shape, name, local, mse)


def qwantize_searches(W: Tensor, H: Tensor, shape: str, local: float, mse: float) -> Iterator[Case]:
    """qwantize's two kernels alone, launched as its wrappers do, on weights in units of tensor_scale."""
    from qwantize.nvfp4.kernels import nvfp4_optimal_hessian_kernel, nvfp4_optimal_kernel

    x = (W / choose_tensor_scale(W, NVFP4)).reshape(-1, 16)
    table = scale_values(E4M3, W.device)
    out, scales = torch.empty_like(x), x.new_empty(len(x))
    yield (
        "search_local",
        "qwantize",
        shape,
        "float32",
        local,
        lambda: nvfp4_optimal_hessian_kernel[(len(x),)](
            x, table, H, out, scales, len(x), len(H), 16, 1, BLOCK_SIZE=16, NUM_SCALES=126
        ),
    )
    yield (
        "search_mse",
        "qwantize",
        shape,
        "float32",
        mse,
        lambda: nvfp4_optimal_kernel[(len(x),)](x, table, out, scales, len(x), 16, 1, BLOCK_SIZE=16, NUM_SCALES=126),
    )


def load_modelopt(folder: Path) -> types.ModuleType:
    """ModelOpt's sweep file with the two it imports, without running the package's __init__ (which needs all of ModelOpt)."""
    kernels = "modelopt.torch.kernels.quantization"
    used = ("modelopt.torch.quantization.utils", f"{kernels}.gemm", f"{kernels}.common")
    for name in sorted({module.rsplit(".", depth)[0] for module in used for depth in range(module.count(".") + 1)}):
        module = types.ModuleType(name)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = module
    numbers = types.ModuleType("modelopt.torch.quantization.utils.numeric_utils")
    numbers.E4M3_MAX = 448.0
    sys.modules[numbers.__name__] = numbers
    return import_module(f"{kernels}.gemm.nvfp4_fp8_sweep")


def modelopt_searches(
    sweep: types.ModuleType, W: Tensor, H: Tensor, shape: str, dtype: str, local: float, mse: float
) -> Iterator[Case]:
    x, amax = W.reshape(-1), W.abs().amax().float()
    candidates = sweep.fp8_scale_candidates(W.device).float()
    scales, amaxes, best = candidates * amax / 6, candidates * amax, torch.empty(W.numel() // 16, device="cuda")
    grid = (triton.cdiv(W.shape[0], 32) * len(H),)
    yield (
        "search_local",
        "modelopt",
        shape,
        dtype,
        local,
        lambda: sweep._fp8_scale_sweep_hessian_kernel[grid](
            x, H, scales, amaxes, best, W.shape[0], len(H), BLOCK_SIZE=16, NUM_CANDIDATES=126, ROWS_PER_PROGRAM=32, num_warps=4
        ),
    )
    yield "search_mse", "modelopt", shape, dtype, mse, lambda: sweep.nvfp4_fp8_scale_sweep(W, amax, 16)


def memory_cases(rows: int, columns: int, tokens: int) -> Iterator[Case]:
    """Quantize, Hessians and the whole drop-in call."""
    from qwantize.nvfp4.kernels import nvfp4_naive_triton, nvfp4_optimal_hessian_triton

    W = weights(rows, columns).bfloat16()
    blocks, X = W.view(rows, columns // 16, 16), activations(tokens, columns)
    ts, shape, inputs = choose_tensor_scale(W, NVFP4), f"{rows}x{columns}", f"{tokens}x{columns}"
    store = W.numel() * (2 + 0.5 + 1 / 16) / BYTES_PER_MS
    yield "quantize_absmax", "ptq", shape, "bfloat16", store, lambda: quantize.quantize_blocks(W, NVFP4, ts)
    yield "quantize_absmax", "qwantize", shape, "bfloat16", store, lambda: nvfp4_naive_triton(blocks)
    read = X.numel() * 2 / BYTES_PER_MS
    yield "block_hessian", "ptq", inputs, "bfloat16", read, lambda: hessian.block_hessian(X, 16)
    yield "block_hessian", "qwantize", inputs, "bfloat16", read, lambda: qwantize_hessians(X)
    whole = read + W.numel() * (4 + 4) / BYTES_PER_MS + W.numel() * (9 * 19.5 + 8 * 12) / LANES_PER_MS
    F = blocks.float()
    for provider, call in (("ptq", nvfp4_optimal_hessian), ("qwantize", nvfp4_optimal_hessian_triton)):
        yield "drop_in_hessian", provider, f"{shape}x{tokens}", "float32", whole, lambda call=call: call(F, X=X)
    H = torch.zeros(columns, columns, device="cuda")
    product = 2 * tokens * columns**2 / BF16_PER_MS
    yield "full_hessian", "ptq", inputs, "bfloat16", product, lambda: add_lower(H, X)
    yield "full_hessian", "torch float32", inputs, "bfloat16", product, lambda: H.addmm_(X.float().T, X.float())


def qwantize_hessians(X: Tensor, block: int = 16) -> Tensor:
    """The loop over blocks inside qwantize 0.1.1's nvfp4_optimal_hessian_triton."""
    H = torch.empty(X.shape[1] // block, block, block, device=X.device)
    for j in range(len(H)):
        part = X[:, j * block : (j + 1) * block].float()
        H[j] = torch.zeros(block, block, device=X.device).addmm_(part.T, part)
    return H


def gptq_cases(rows: int, n: int, tokens: int) -> Iterator[Case]:
    X = activations(tokens, n)
    H = torch.zeros(n, n, device="cuda")
    add_lower(H, X)
    A = damped(mirror(H) / tokens, 0.01)
    del H, X
    flops = LANES_PER_MS * 2
    yield "factor", "ptq", str(n), "float32", 2 * n**3 / 3 / flops, lambda: inverse_factor(A)
    yield (
        "factor",
        "torch, three calls",
        str(n),
        "float32",
        2 * n**3 / 3 / flops,
        lambda: torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(A)), upper=True),
    )
    U = inverse_factor(A)
    W = weights(rows, n)
    for format, rules in GPTQ_CASES:
        x = W / choose_tensor_scale(W, format)
        suffix = "" if format is NVFP4 else f"_{format.name}"
        for rule in rules:
            yield (
                f"gptq_{rule}{suffix}",
                "ptq",
                f"{rows}x{n}",
                "float32",
                rows * n**2 / flops,
                lambda x=x, format=format, rule=rule: sweep(x, A, U, format, rule, 128),
            )


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    modelopt = load_modelopt(arguments.modelopt) if arguments.modelopt else None
    for dtype in (torch.float32, torch.bfloat16):
        yield from search_cases(ROWS, COLUMNS, dtype, modelopt)
    yield from memory_cases(ROWS, COLUMNS, TOKENS)
    yield from gptq_cases(ROWS, COLUMNS, TOKENS)
    if arguments.sizes:
        for columns in (1024, 2048, 4096, 8192):
            yield from search_cases(ROWS, columns, torch.float32, None)
            yield from memory_cases(ROWS, columns, TOKENS)


def measure(call: Callable[[], object]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile in ms; the L2 is flushed between calls."""
    call()
    return tuple(triton.testing.do_bench(call, warmup=25, rep=200, quantiles=[0.5, 0.2, 0.8]))


def tests_pass(workers: int) -> bool:
    """Whether the tests of the kernels that are timed pass: all but MXFP4's searches, which compile for half a minute each."""
    root = Path(__file__).resolve().parent.parent
    files = sorted(str(path) for path in (root / "tests").glob("test_kernels*.py"))
    parallel = ["-n", str(workers)] if workers > 1 else []
    return (
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-k", "not mxfp4 or panel", *parallel, *files], cwd=root
        ).returncode
        == 0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"))
    parser.add_argument("--modelopt", type=Path, help="folder of an unpacked nvidia-modelopt wheel")
    parser.add_argument("--sizes", action="store_true", help="smaller widths too, for the picture")
    parser.add_argument("--only", nargs="*", default=None, help="kernels to time")
    parser.add_argument("--workers", type=int, default=1, help="processes for the tests (needs pytest-xdist)")
    parser.add_argument("--commit", default="unknown", help="recorded in the CSV")
    arguments = parser.parse_args()
    if not tests_pass(arguments.workers):
        raise SystemExit("the kernels' tests fail: no times are taken")
    machine = (torch.cuda.get_device_name(), torch.__version__, triton.__version__, arguments.commit)
    path = arguments.output / "kernels.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        print(f"{'kernel':16} {'provider':20} {'shape':18} {'dtype':9} {'ms':>9} {'floor':>7} {'ratio':>6}")
        for kernel, provider, shape, dtype, floor, call in cases(arguments):
            if arguments.only and kernel not in arguments.only:
                continue
            median, low, high = measure(call)
            writer.writerow((kernel, provider, shape, dtype, *(f"{t:.4f}" for t in (median, low, high, floor)), *machine))
            file.flush()
            print(
                f"{kernel:16} {provider:20} {shape:18} {dtype:9} {median:9.3f} {floor:7.3f} {median / floor:6.1f}", flush=True
            )


if __name__ == "__main__":
    main()
