"""What a run will cost: with rates measured on an H200, seconds and memory.  T: calibration tokens."""

from collections import Counter
from dataclasses import dataclass, replace

from ptq.calibrate.activations import DEVICE_SHARE
from ptq.calibrate.importance import POSITIONS_AT_ONCE, SEGMENT
from ptq.calibrate.passes import RESERVE
from ptq.core.linalg import packed_size
from ptq.cost.shape import LayerShape, Shape, climbed, drift_elements, drift_met, operations
from ptq.methods.gptq import rows_at_once
from ptq.run.batch import HESSIANS_AT_ONCE
from ptq.run.curvature import ROOM_TO_WAIT
from ptq.runtime.distributed import Ranks, shard_rows
from ptq.settings import VALIDATION_SEQUENCES

BF16_RATE = 790e12
"""bfloat16 matmul, operations a second: measured, 8192³."""
DISK_RATE = {"write": 2e9, "read": 3.3e9}
"""Bytes a second of G from the GPU to files, by two threads; and back, unpacked."""
FACTOR_RATE = 81.8e12
"""Operations a second of a factorization and its inverse, the large products by bfloat16 pieces."""
STEP = 4.7e-4
"""Seconds to launch one step of row feedback: an antidiagonal of tiles."""
FP32_RATE = 66.8e12
"""float32 arithmetic: 132 multiprocessors × 128 lanes × 1.98 GHz × 2."""


FLOAT32_PHASES = ("drift", "factorization", "sweep")

EXPERT_CALL = {"forward": 1.7e-4, "hessian": 1.5e-4}
"""Seconds to launch the work of one expert on one batch: running it, and adding one of its inputs to its sums."""
EXPERT_ELEMENT = {"forward": 1.5e-10, "hessian": 0.45e-10}
"""Seconds to move one element of its tokens: of what it is given, and of an input that is summed.  Launches from Qwen3-30B-A3B at
batches of 16 and 64 sequences (b9a6670, d117b8c in benchmarks/models.csv), what is left from 8ffc03c5."""


def floor_seconds(shape: Shape) -> float:
    """The operations at the rates of the device: no run is faster."""
    return sum(count / (FP32_RATE if name in FLOAT32_PHASES else BF16_RATE) for name, count in operations(shape).items())


def disk_bytes(shape: Shape) -> int:
    """What lies beside the unfinished checkpoint: the lower triangle of G of every linear in float32."""
    triangles = shape.total(lambda layer: sum(4 * packed_size(d_out) for d_out, _ in layer.linears))
    return int(triangles) if shape.rows else 0


def graph_bytes(shape: Shape, layer: LayerShape) -> float:
    """What autograd keeps of one token in one layer in bfloat16, counted with hooks on the saved tensors of a Llama layer; the
    traffic of its elementwise operations is proportional to it."""
    return 13.5 * shape.head[1] + 6 * layer.inner


def seconds(shape: Shape, ranks: int = 1, batch: int = 1, kept: float = 1.0) -> dict[str, float]:
    """Estimated seconds by phase on H200s: products at a rate, and what grows with the tensors' sizes.

    The constants are fitted to runs of the shapes Llama-3.2-1B, 3.1-8B and 3.1-70B (docs/performance.md), to 10 % in each phase
    but 1B's report.  Sequences are shared by the ranks, `batch` of them at once, and matrices or their rows as
    ptq.runtime.distributed.shard_rows says.  `kept`: the part of the paused passes that there is memory for.
    """
    T = shape.tokens
    batches = ranks * -(-shape.sequences // (ranks * batch))
    found: dict[str, float] = {}
    once = shape.total(lambda layer: pass_seconds(shape, layer))
    if shape.importance:
        found["importance"] = max(importance_seconds(shape, once) / ranks, disk_bytes(shape) / DISK_RATE["write"])
    if shape.calibrate:
        forward = shape.total(lambda layer: forward_seconds(shape, layer, kept))
        found["forward"] = (forward + shape.total(lambda layer: expert_seconds(shape, layer, batches, "forward"))) / ranks
        products = 1.25 * T * shape.total(lambda layer: sum(group.share * group.d_in**2 for group in layer.to_solve))
        products += 2 * T * shape.total(drift_met) if shape.drift else 0
        columns = shape.total(lambda layer: sum(group.share * group.d_in for group in layer.to_solve))
        weighting = products / 2800e12 + (2 if shape.drift else 1) * 2.26e-12 * T * columns if shape.importance else 0
        moving = shape.total(lambda layer: expert_seconds(shape, layer, batches, "hessian"))
        found["hessian"] = (products / 660e12 + weighting + moving) / ranks
    if shape.feedback:
        phases = ("factorization", "sweep", "report", "drift")
        found |= dict.fromkeys(phases, 0.0)
        for layer, count in shape.layers:
            for phase, cost in zip(phases, layer_solve_seconds(layer, ranks), strict=True):
                found[phase] += count * cost
        found["sweep"] += (
            shape.total(lambda layer: sum(row_feedback_seconds(*size) for size in layer.linears)) if shape.rows else 0
        )
        validated = replace(shape, sequences=VALIDATION_SEQUENCES)
        found["report"] += 2 * once * VALIDATION_SEQUENCES / shape.sequences
        found["report"] += shape.total(lambda layer: expert_seconds(validated, layer, 1, "forward"))
        if not shape.drift:
            del found["drift"]
    return found


def pass_seconds(shape: Shape, layer: LayerShape) -> float:
    """All tokens through the layer."""
    T = shape.tokens
    return (2 * T * layer.met + 2 * T * shape.length * shape.attention) / 540e12 + 0.25e-12 * T * graph_bytes(shape, layer)


def forward_seconds(shape: Shape, layer: LayerShape, kept: float) -> float:
    """All tokens through the layer in each model.  Passes that are not kept run to every wave from the start; where all is
    collected at once, that of the quantized model does."""
    whole, models = pass_seconds(shape, layer), 2 if shape.drift else 1
    again = sum(part_seconds(shape, layer, number) for number in range(len(layer.passes)))
    return models * (whole + (1 - kept) * again) if len(layer.passes) > 1 else models * whole + again


def expert_seconds(shape: Shape, layer: LayerShape, batches: int, phase: str) -> float:
    """What a mixture takes beside its operations; 0 of a dense layer.  Its experts run once in each model, wave after wave."""
    groups = [group for group in layer.to_solve if group.share < 1]
    calls, columns = len(groups), sum(group.share * group.d_in for group in groups)
    if phase == "forward":
        models = 2 if shape.drift else 1
        experts = [group for group in groups if len(group.rows) > 1]  # gate and up read what an expert is given
        runs = models if len(layer.passes) > 1 else 2 * models
        calls, columns = runs * len(experts), runs * sum(group.share * group.d_in for group in experts)
    return calls * batches * EXPERT_CALL[phase] + shape.tokens * columns * EXPERT_ELEMENT[phase]


def part_seconds(shape: Shape, layer: LayerShape, number: int) -> float:
    """A pass that ends when all its groups have been observed."""
    last = layer.groups[layer.passes[number][-1]]
    return pass_seconds(shape, layer) * last.ran / layer.met


def importance_seconds(shape: Shape, once: float) -> float:
    T, head = shape.tokens, 4 * shape.tokens * shape.head[0] * shape.head[1]
    attention = 3.5 * 2 * T * shape.length * shape.attention
    down = shape.total(lambda layer: (4 * T * layer.met + attention) / 775e12 + 6.46e-12 * T * graph_bytes(shape, layer))
    curvature = 1.25 * T * shape.total(lambda layer: layer.curvature) / 660e12 if shape.rows else 0
    return climbed(shape) * once + down + head / 548e12 + 7.5e-12 * T * shape.head[0] + curvature


def layer_solve_seconds(layer: LayerShape, ranks: int) -> list[float]:
    """Factorization, sweep, report and drift of one layer, of the slowest rank of each pass."""
    totals = [0.0] * 4
    for part in layer.passes:
        matrices = [matrix for number in part for matrix in layer.groups[number].matrices]
        shards = shard_rows(matrices, Ranks(size=ranks), divisible=True)
        by_rank = []
        for rank in range(ranks):
            own = Counter((len(shard[rank]), d_in) for shard, (_, d_in) in zip(shards, matrices, strict=True) if shard[rank])
            by_rank.append([solve_seconds(*size, count) for size, count in own.items()])
        slowest = max(by_rank, key=lambda costs: sum(map(sum, costs)))
        totals = [total + sum(costs) for total, costs in zip(totals, zip(*slowest, strict=True), strict=True)]
    return totals


def solve_seconds(d_out: int, d_in: int, count: int = 1) -> tuple[float, float, float, float]:
    """Of d_out rows of each of `count` stages alike, which are solved in batches: factorization, sweep, report, drift."""
    weights, product, cube = count * d_out * d_in, count * d_out * d_in * d_in, count * d_in**3
    columns = d_in * -(-count // max(1, HESSIANS_AT_ONCE // d_in**2))  # one after the other, in all batches
    return (
        2 / 3 * cube / FACTOR_RATE + 1.4e-6 * columns,
        product / 99e12 + 2.9e-10 * weights + 6.6e-7 * columns,
        product / 361e12 + 0.93e-10 * weights,
        (cube / 3 + 3 * product) / 72.2e12 + 2.36e-6 * columns,
    )


def row_feedback_seconds(d_out: int, d_in: int) -> float:
    """What sweeping a linear by tiles takes more than at once: launches, reading G, and its factor."""
    steps = -(-d_out // rows_at_once(d_out)) + d_in // 128
    return STEP * steps + 4 * packed_size(d_out) / DISK_RATE["read"] + 2 / 3 * d_out**3 / FACTOR_RATE


@dataclass(frozen=True)
class Memory:
    """Bytes at the peaks.  `kept`: inputs of segments that the backward pass starts from, on the device or the host.
    `passes_kept`: the part of the paused passes that there is memory for."""

    hidden: int
    kept: int
    kept_on_host: bool
    gpu: int
    host: int
    passes_kept: float


def memory(shape: Shape, batch: int, *, ranks: int = 1, on_host: bool | None = None, device_bytes: float = 141e9) -> Memory:
    """Peaks of a rank, for a bfloat16 model; measured ones were within 14 %, but for two layers under
    `deterministic`.  `device_bytes`: memory of the GPU."""
    d, tokens, largest = shape.head[1], -(-shape.sequences // ranks) * shape.length, shape.largest
    layer, hidden = 2 * largest.weights, 2 * tokens * d
    starts = -(-shape.depth // SEGMENT)
    kept = hidden * (starts - 1) if shape.importance else 0
    hidden_away = hidden > device_bytes * DEVICE_SHARE if on_host is None else on_host  # each by itself
    kept_away = hidden * starts > device_bytes * DEVICE_SHARE if on_host is None else on_host
    on_gpu = 0 if hidden_away else hidden
    importance = 0.0
    if shape.importance:
        importance = on_gpu + (0 if kept_away else kept) + importance_bytes(shape, batch)
        importance += min(curvature_bytes(shape) / 2, max(0, ROOM_TO_WAIT * device_bytes - importance))  # waits to be written
    if shape.drift:  # and the original's
        hidden, on_gpu = 2 * hidden, 2 * on_gpu
    solvers = ranks if shape.drift and not shape.rows and len(largest.passes) > 1 else 1
    quantize = on_gpu + 4 * layer + solve_bytes(shape, largest, batch * shape.length, solvers)
    wanted = 2 * tokens * paused_elements(shape, largest)
    paused = min(wanted, max(0.0, (1 - RESERVE) * device_bytes - quantize))
    host = 2.3e9 + (8 / 3 if shape.drift else 2) * layer + (hidden if hidden_away else 0) + (kept if kept_away else 0)
    share = paused / wanted if wanted else 1.0
    return Memory(hidden, kept, kept_away, int(max(importance, quantize + paused)), int(host), share)


def paused_elements(shape: Shape, layer: LayerShape) -> int:
    """What paused passes hold of a token, in both models: at the second wave the first's input and outputs and its own input; at
    the last the streams and the input of the quantized model's."""
    if not shape.drift:
        return 0
    d, first = shape.head[1], layer.groups[0]
    if len(layer.passes) < 2:
        return d  # the original's output
    return max(2 * (d + sum(first.rows) + layer.groups[1].d_in), 2 * d + layer.inner)


def importance_bytes(shape: Shape, batch: int) -> float:
    """On the GPU in the backward pass, beside hidden states."""
    largest, part = shape.largest, min(SEGMENT, shape.depth)
    small = max(1, batch // max(1, part // 2)) * shape.length
    logits = POSITIONS_AT_ONCE * shape.head[0] * 18
    graph = small * part * graph_bytes(shape, largest)
    return (part + 1) * 2 * largest.weights + curvature_bytes(shape) + graph + logits + 2 * shape.head[0] * shape.head[1]


def curvature_bytes(shape: Shape) -> int:
    """G of a segment, on the GPU."""
    return 4 * min(SEGMENT, shape.depth) * shape.largest.curvature if shape.rows else 0


def solve_bytes(shape: Shape, layer: LayerShape, at_once: int, solvers: int) -> float:
    """On the GPU in one pass of a layer: its sums, and beside them what it takes to collect or to solve them."""
    d = shape.head[1]
    if shape.drift and len(layer.passes) > 1:  # the groups of one wave are there at a time, and each rank has its rows
        waves = [[layer.groups[number] for number in part] for part in layer.passes]
        sums = max(sum(4 * (group.stream + group.d_in) * group.d_in for group in wave) for wave in waves)
        squares, slabs = 5, 4
    else:
        sums, squares, slabs = 4 * sum(group.d_in**2 for group in layer.to_solve), 6, 7
        sums += 4 * drift_elements(layer) if shape.drift else 0
    collect = at_once * (8 * d + 10 * layer.inner)  # four tensors of the MLP, its input seen in the original
    alike = Counter(layer.matrices)
    solve = max(
        4 * (squares * d_in + slabs * d_out / solvers) * d_in * min(count, max(1, HESSIANS_AT_ONCE // d_in**2))
        for (d_out, d_in), count in alike.items()
    )
    return sums + max(collect, solve)
