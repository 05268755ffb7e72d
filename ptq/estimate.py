"""What a run will cost: operations counted from the shapes, and with rates measured on an H200, seconds and memory.

One operation is a multiplication or an addition.  T: calibration tokens; a linear is (d_out, d_in).
"""

from dataclasses import dataclass

from ptq.adapter import Adapter
from ptq.config import QuantConfig
from ptq.plan import Plan
from ptq.token_weights import SEGMENT

BF16_RATE = 790e12
"""bfloat16 matmul, operations a second: measured, 8192³."""
FP32_RATE = 66.8e12
"""float32 arithmetic: 132 multiprocessors × 128 lanes × 1.98 GHz × 2."""


@dataclass(frozen=True)
class Shape:
    """What costs depend on.  `stages`: (d_out, d_in) of each stage of a layer, the linears together.  `attention`: width of the
    attention output.  `head`: (vocabulary, d)."""

    stages: tuple[tuple[int, int], ...]
    attention: int
    layers: int
    head: tuple[int, int]
    sequences: int
    length: int
    weigh: bool = True
    calibrate: bool = True
    feedback: bool = True

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def layer_weights(self) -> int:
        return sum(d_out * d_in for d_out, d_in in self.stages)


def shape_of(plan: Plan, adapter: Adapter, sequences: int, length: int, config: QuantConfig, weighing: str) -> Shape:
    """From the first layer; `adapter` is one of ptq.models."""
    name, layer = next(adapter.skeleton())
    found = {key: module for key, module in layer.named_modules() if f"{name}.{key}" in plan.linears}
    stages = [[found[key] for key in stage if key in found] for stage in adapter.stages]
    head = adapter.model.get_output_embeddings()  # type: ignore[attr-defined]
    return Shape(
        stages=tuple((sum(linear.out_features for linear in stage), stage[0].in_features) for stage in stages if stage),
        attention=layer.get_submodule(adapter.stages[1][0]).in_features,  # type: ignore[arg-type]
        layers=len(adapter.names),
        head=(head.out_features, head.in_features),
        sequences=sequences,
        length=length,
        weigh=weighing != "none",
        calibrate=config.needs_calibration,
        feedback=config.method == "gptq",
    )


def operations(shape: Shape) -> dict[str, float]:
    """Operations of the whole run by phase, of which none can be left out."""
    T, layers = shape.tokens, shape.layers
    linear = 2 * T * shape.layer_weights
    attention = 2 * T * shape.length * shape.attention  # two products, causal
    climbed = (layers - 1) // SEGMENT * SEGMENT
    counts: dict[str, float] = {}
    if shape.weigh:
        head = 2 * T * shape.head[0] * shape.head[1]
        counts["weigh"] = climbed * (linear + attention) + layers * (2 * linear + 3.5 * attention) + 2 * head
    if shape.calibrate:
        counts["forward"] = 2 * layers * (linear + attention)
        counts["hessian"] = layers * sum(T * d_in * d_in for _, d_in in shape.stages)
    if shape.feedback:
        counts["factorization"] = layers * sum(2 / 3 * d_in**3 for _, d_in in shape.stages)
        # the updates of a sweep are half a product; the certificate is a whole one
        counts["sweep"] = layers * sum(3 * d_out * d_in * d_in for d_out, d_in in shape.stages)
    if shape.calibrate:
        counts["report"] = layers * sum(4 * d_out * d_in * d_in for d_out, d_in in shape.stages)
    return counts


FLOAT32_PHASES = ("factorization", "sweep")


def floor_seconds(shape: Shape) -> float:
    """The operations at the rates of the device: no run is faster."""
    return sum(count / (FP32_RATE if name in FLOAT32_PHASES else BF16_RATE) for name, count in operations(shape).items())
