"""What a run will cost: operations counted from the shapes, and with rates measured on an H200, seconds and memory.

One operation is a multiplication or an addition.  T: calibration tokens; a linear is (d_out, d_in).
"""

from dataclasses import dataclass

from torch import nn

from ptq.calibrate.activations import DEVICE_SHARE
from ptq.calibrate.importance import POSITIONS_AT_ONCE, SEGMENT
from ptq.data.text import VALIDATION_SEQUENCES
from ptq.methods.gptq import rows_at_once
from ptq.run.config import QuantConfig
from ptq.run.plan import Plan
from ptq.runtime.adapter import Adapter
from ptq.runtime.distributed import Ranks, shard_rows

BF16_RATE = 790e12
"""bfloat16 matmul, operations a second: measured, 8192³."""
DISK_RATE = 0.73e9
"""Bytes a second from the GPU to a file that is on the disk for good."""
FP32_RATE = 66.8e12
"""float32 arithmetic: 132 multiprocessors × 128 lanes × 1.98 GHz × 2."""


@dataclass(frozen=True)
class Shape:
    """What costs depend on.  `stages`: (d_out, d_in) of each stage to quantize in a layer, the linears together.

    `layer_weights`: of all linears.  `attention`: width of the attention output; `inner`: of the MLP.  `head`: (vocabulary, d).
    `rows`: (d_out, d_in) of each linear of a layer, where errors are fed forward over rows too.
    """

    stages: tuple[tuple[int, int], ...]
    layer_weights: int
    attention: int
    inner: int
    layers: int
    head: tuple[int, int]
    sequences: int
    length: int
    importance: bool = True
    calibrate: bool = True
    feedback: bool = True
    drift: bool = False
    stagewise: bool = True
    rows: tuple[tuple[int, int], ...] = ()

    @property
    def curvature(self) -> int:
        """Elements of G of a layer's linears."""
        return sum(d_out * d_out for d_out, _ in self.rows)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def shape_of(plan: Plan, adapter: Adapter, sequences: int, length: int, config: QuantConfig, importance: str) -> Shape:
    """From the first layer; `adapter` is one of ptq.models."""
    name, layer = next(adapter.skeleton())
    shapes = {
        key: (module.out_features, module.in_features) for key, module in layer.named_modules() if isinstance(module, nn.Linear)
    }
    stages = [[shapes[key] for key in stage if f"{name}.{key}" in plan.linears] for stage in adapter.stages]
    head = adapter.model.get_output_embeddings()  # type: ignore[attr-defined]
    return Shape(
        stages=tuple((sum(d_out for d_out, _ in stage), stage[0][1]) for stage in stages if stage),
        layer_weights=sum(d_out * d_in for d_out, d_in in shapes.values()),
        attention=shapes[adapter.stages[1][0]][1],
        inner=shapes[adapter.stages[-1][0]][1],
        layers=len(adapter.names),
        head=(head.out_features, head.in_features),
        sequences=sequences,
        length=length,
        importance=importance != "none",
        calibrate=config.needs_calibration,
        feedback=config.method == "gptq",
        drift=config.drift > 0,
        stagewise=config.stagewise,
        rows=tuple(shapes[key] for stage in adapter.stages for key in stage) if config.row_feedback else (),
    )


def operations(shape: Shape) -> dict[str, float]:
    """Operations of the whole run by phase, of which none can be left out."""
    T, layers = shape.tokens, shape.layers
    linear = 2 * T * shape.layer_weights
    attention = 2 * T * shape.length * shape.attention  # two products, causal
    climbed = (layers - 1) // SEGMENT * SEGMENT
    counts: dict[str, float] = {}
    if shape.importance:
        head = 2 * T * shape.head[0] * shape.head[1]
        counts["importance"] = climbed * (linear + attention) + layers * (2 * linear + 3.5 * attention) + 2 * head
        counts["importance"] += layers * T * shape.curvature
    if shape.calibrate:
        counts["forward"] = (3 if shape.drift else 2) * layers * (linear + attention)
        counts["hessian"] = layers * sum(T * d_in * d_in for _, d_in in shape.stages)
    if shape.drift:
        counts["hessian"] += layers * 2 * T * drift_products(shape)
        counts["drift"] = layers * sum(d_in**3 / 3 + 2 * d_out * d_in * d_in for d_out, d_in in shape.stages)
    if shape.feedback:
        counts["factorization"] = layers * sum(2 / 3 * d_in**3 for _, d_in in shape.stages)
        # the updates of a sweep are half a product; the certificate is a whole one
        counts["sweep"] = layers * sum(3 * d_out * d_in * d_in for d_out, d_in in shape.stages)
    if shape.calibrate:
        counts["report"] = layers * sum(4 * d_out * d_in * d_in for d_out, d_in in shape.stages)
    return counts


def drift_products(shape: Shape) -> int:
    """Elements of what ptq.calibrate.drift sums for a layer: of inputs for two stages, of outputs for two."""
    stream = shape.head[1]
    return stream * (2 * stream + shape.attention + shape.inner)


FLOAT32_PHASES = ("drift", "factorization", "sweep")


def floor_seconds(shape: Shape) -> float:
    """The operations at the rates of the device: no run is faster."""
    return sum(count / (FP32_RATE if name in FLOAT32_PHASES else BF16_RATE) for name, count in operations(shape).items())


def disk_bytes(shape: Shape) -> int:
    """What lies beside the unfinished checkpoint: the lower triangle of G of every linear in float32."""
    return 4 * shape.layers * sum(d_out * (d_out + 1) // 2 for d_out, _ in shape.rows)


def graph_bytes(shape: Shape) -> float:
    """What autograd keeps of one token in one layer in bfloat16, counted with hooks on the saved tensors of a Llama layer; the
    traffic of its elementwise operations is proportional to it."""
    return 13.5 * shape.head[1] + 6 * shape.inner


def seconds(shape: Shape, ranks: int = 1) -> dict[str, float]:
    """Estimated seconds by phase on H200s: products at a rate, and what grows with the tensors' sizes.

    The constants are fitted to runs of the shapes Llama-3.2-1B, 3.1-8B and 3.1-70B (docs/performance.md), to 7 % in each phase.
    Sequences are shared by the ranks, and stages or their rows as ptq.runtime.distributed.shard_rows says.
    """
    T, layers = shape.tokens, shape.layers
    linear, attention = 2 * T * shape.layer_weights, 2 * T * shape.length * shape.attention
    columns, graph = sum(d_in for _, d_in in shape.stages), T * graph_bytes(shape)
    found: dict[str, float] = {}
    one_pass = (linear + attention) / 548e12 + 0.845e-12 * graph
    if shape.importance:
        climbed, head = (layers - 1) // SEGMENT * SEGMENT, 4 * T * shape.head[0] * shape.head[1]
        down = (2 * linear + 3.5 * attention) / 775e12 + 6.46e-12 * graph
        found["importance"] = (climbed * one_pass + layers * down + head / 548e12 + 7.5e-12 * T * shape.head[0]) / ranks
        found["importance"] += layers * 1.25 * T * shape.curvature / 660e12 / ranks + disk_bytes(shape) / DISK_RATE
    if shape.calibrate:
        unneeded = 2 * T * shape.stages[-1][0] * shape.stages[-1][1] / 548e12  # the last product, when H is collected
        # with drift, the quantized model runs twice and the original once, and to the MLP twice each if stage by stage
        to_mlp = (linear - 2 * T * 3 * shape.inner * shape.head[1] + attention) / 438e12 + 9.5e-12 * T * shape.head[1]
        passes = 3 * one_pass + (4 * to_mlp if shape.stagewise else 0) if shape.drift else 2 * one_pass - unneeded
        found["forward"] = layers * passes / ranks
        products = 1.25 * T * sum(d_in * d_in for _, d_in in shape.stages)
        products += 2 * T * drift_products(shape) if shape.drift else 0
        weighting = products / 2800e12 + (2 if shape.drift else 1) * 2.26e-12 * T * columns if shape.importance else 0
        found["hessian"] = layers * (products / 660e12 + weighting) / ranks
    if shape.feedback:
        phases = ("factorization", "sweep", "report", "drift")
        found |= dict.fromkeys(phases, 0.0)
        for part in [[stage] for stage in shape.stages] if shape.drift and shape.stagewise else [list(shape.stages)]:
            shares = shard_rows(part, Ranks(size=ranks), divisible=True)
            by_rank = [
                [solve_seconds(len(share[rank]), d_in) for share, (_, d_in) in zip(shares, part, strict=True) if share[rank]]
                for rank in range(ranks)
            ]
            for phase, costs in zip(
                phases, zip(*max(by_rank, key=lambda costs: sum(map(sum, costs))), strict=True), strict=True
            ):
                found[phase] += layers * sum(costs)
        found["sweep"] += layers * sum(row_feedback_seconds(d_out, d_in) for d_out, d_in in shape.rows)
        found["report"] += layers * 2 * one_pass * VALIDATION_SEQUENCES / shape.sequences
        if not shape.drift:
            del found["drift"]
    return found


def solve_seconds(d_out: int, d_in: int) -> tuple[float, float, float, float]:
    """Of d_out rows of a stage: factorization, sweep, report, drift."""
    weights, product = d_out * d_in, d_out * d_in * d_in
    return (
        2 / 3 * d_in**3 / 42.8e12 + 1.07e-6 * d_in,
        product / 29.3e12 + 4.33e-10 * weights,
        product / 361e12 + 0.93e-10 * weights,
        (d_in**3 / 3 + 3 * product) / 45e12 + 1.9e-6 * d_in,
    )


def row_feedback_seconds(d_out: int, d_in: int) -> float:
    """What sweeping a linear panel of rows after panel of rows takes more than at once: launches, and the factor of G."""
    panels = -(-d_out // rows_at_once(d_out))
    return 1.15e-6 * panels * d_in + 2 / 3 * d_out**3 / 42.8e12


@dataclass(frozen=True)
class Memory:
    """Bytes at the peaks.  `kept`: inputs of segments that the backward pass starts from, on the device or the host."""

    hidden: int
    kept: int
    kept_on_host: bool
    gpu: int
    host: int


def memory(shape: Shape, batch: int, *, ranks: int = 1, on_host: bool | None = None, device_bytes: float = 141e9) -> Memory:
    """Peaks of a rank, for a bfloat16 model; measured ones were within 14 %, but for two layers under
    `deterministic`.  `device_bytes`: memory of the GPU."""
    d, tokens = shape.head[1], -(-shape.sequences // ranks) * shape.length
    layer, hidden = 2 * shape.layer_weights, 2 * tokens * d
    starts = -(-shape.layers // SEGMENT)
    kept = hidden * (starts - 1) if shape.importance else 0
    hidden_away = hidden > device_bytes * DEVICE_SHARE if on_host is None else on_host  # each by itself
    kept_away = hidden * starts > device_bytes * DEVICE_SHARE if on_host is None else on_host
    at_once = batch * shape.length
    part = min(SEGMENT, shape.layers)
    small = max(1, batch // max(1, part // 2)) * shape.length
    logits = POSITIONS_AT_ONCE * shape.head[0] * 18
    on_gpu = 0 if hidden_away else hidden
    weigh = (
        on_gpu
        + (0 if kept_away else kept)
        + (part + 1) * layer
        + 4 * part * shape.curvature
        + small * part * graph_bytes(shape)
        + logits
        + 2 * shape.head[0] * d
    )
    if shape.drift:  # and the original's: a layer beside three, what goes into it and comes out
        layer, hidden, on_gpu = layer * 4 // 3, 3 * hidden, 3 * on_gpu
    if shape.drift and shape.stagewise:  # one stage is there at a time, and each rank has its rows
        hessians, squares, slabs = 4 * (shape.inner + d) * shape.inner, 5, 4
        solvers = 1 if shape.rows else ranks
    else:
        hessians, squares, slabs, solvers = 4 * sum(d_in * d_in for _, d_in in shape.stages), 6, 7, 1
        hessians += 4 * drift_products(shape) if shape.drift else 0
    collect = at_once * (8 * d + 10 * shape.inner)  # four tensors of the MLP, its input seen in the original
    solve = max(4 * (squares * d_in + slabs * d_out / solvers) * d_in for d_out, d_in in shape.stages)
    quantize = on_gpu + 3 * layer + hessians + max(collect, solve)
    gpu = max(weigh if shape.importance else 0, quantize)
    host = 2.3e9 + 2 * layer + (hidden if hidden_away else 0) + (kept if kept_away else 0)
    return Memory(hidden, kept, kept_away, int(gpu), int(host))
