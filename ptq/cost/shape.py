"""What a run consists of, from the loop's own description (ptq.run.plan): sizes, and the operations that cannot be left out.

One operation is a multiplication or an addition.  T: calibration tokens; a matrix is (d_out, d_in).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from ptq.calibrate.importance import SEGMENT
from ptq.models.families import head_dim
from ptq.run.plan import Pass, Plan
from ptq.runtime.adapter import Layer, LayerPlan, Skeleton


@dataclass(frozen=True)
class GroupShape:
    """One group of linears (ptq.runtime.adapter): `rows`, output features of each; `stream`: width of what drift sums for it.

    `matrices`: (d_out, d_in) of each matrix to solve.  `ran`: weights that a token has met in the layer when this input is
    there.  `share`: of the tokens that it sees.  `curved`: G of its linears is wanted where there is row feedback.
    """

    d_in: int
    rows: tuple[int, ...]
    stream: int
    matrices: tuple[tuple[int, int], ...]
    ran: float
    share: float = 1.0
    curved: bool = True

    @property
    def weights(self) -> int:
        return sum(self.rows) * self.d_in


@dataclass(frozen=True)
class LayerShape:
    """The groups of a layer in the order they run, and by their numbers, what is collected in one pass."""

    groups: tuple[GroupShape, ...]
    passes: tuple[tuple[int, ...], ...]

    @property
    def weights(self) -> int:
        return sum(group.weights for group in self.groups)

    @property
    def met(self) -> float:
        """Weights that a token meets."""
        return sum(group.weights * group.share for group in self.groups)

    @property
    def inner(self) -> int:
        return max(group.d_in for group in self.groups)

    @property
    def to_solve(self) -> list[GroupShape]:
        return [self.groups[number] for part in self.passes for number in part]

    @property
    def matrices(self) -> list[tuple[int, int]]:
        return [matrix for group in self.to_solve for matrix in group.matrices]

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Those that errors may be fed forward over rows of."""
        return [(d_out, group.d_in) for group in self.groups if group.curved for d_out in group.rows]

    @property
    def curvature(self) -> int:
        """Elements of G of all linears."""
        return sum(d_out * d_out for d_out, _ in self.linears)


@dataclass(frozen=True)
class Shape:
    """What costs depend on.  `layers`: how many there are of each shape.  `attention`: width of the attention's output.

    `head`: (vocabulary, d).  `rows`: errors are fed forward over rows too.
    """

    layers: tuple[tuple[LayerShape, int], ...]
    attention: int
    head: tuple[int, int]
    sequences: int
    length: int
    importance: bool = True
    calibrate: bool = True
    feedback: bool = True
    drift: bool = False
    rows: bool = False

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def depth(self) -> int:
        return sum(count for _, count in self.layers)

    @property
    def largest(self) -> LayerShape:
        return max((layer for layer, _ in self.layers), key=lambda layer: layer.weights)

    def total(self, cost: Callable[[LayerShape], float]) -> float:
        """Of all layers."""
        return sum(count * cost(layer) for layer, count in self.layers)


def layer_shape(layer: Layer, plan: LayerPlan, passes: tuple[Pass, ...]) -> LayerShape:
    """As the loop describes its work (ptq.run.plan)."""
    matrices = {group.names: tuple(matrix.shape for matrix in group.matrices) for part in passes for group in part}
    groups: list[GroupShape] = []
    for names in plan.groups:
        linears = [layer.linear(name) for name in names]
        rows, d_in = tuple(linear.out_features for linear in linears), linears[0].in_features
        writes = len(names) == 1 and names[0] in plan.residual
        ran = sum(group.weights * group.share for group in groups)
        share = plan.share if names[0] in plan.experts else 1.0
        stream = rows[0] if writes else d_in
        groups.append(GroupShape(d_in, rows, stream, matrices.get(names, ()), ran, share, curved=not plan.last))
    number = {names: index for index, names in enumerate(plan.groups)}
    parts = tuple(tuple(number[group.names] for group in part) for part in passes)
    return LayerShape(tuple(groups), parts)


def shape_of(plan: Plan, adapter: Skeleton, sequences: int, length: int, importance: str) -> Shape:
    there = chain(adapter.skeleton(), [adapter.head()])
    layers = zip(there, plan.layers, plan.passes, strict=False)  # the head only if it is planned
    shapes = Counter(layer_shape(*each) for each in layers)
    model, recipes = adapter.model, plan.recipes.values()
    head, config = model.get_output_embeddings(), model.config
    return Shape(
        layers=tuple(shapes.items()),
        attention=config.num_attention_heads * head_dim(config),
        head=(head.out_features, head.in_features),
        sequences=sequences,
        length=length,
        importance=importance != "none",
        calibrate=plan.needs_calibration is not None,
        feedback=any(recipe.method == "gptq" for recipe in recipes),
        drift=plan.drift,
        rows=plan.row_feedback,
    )


def operations(shape: Shape) -> dict[str, float]:
    """Operations of the whole run by phase, of which none can be left out."""
    T = shape.tokens
    attention = 2 * T * shape.length * shape.attention  # two products, causal
    one_pass = shape.total(lambda layer: 2 * T * layer.met + attention)
    counts: dict[str, float] = {}
    if shape.importance:
        head = 2 * T * shape.head[0] * shape.head[1]
        down = shape.total(lambda layer: 4 * T * layer.met + 3.5 * attention)
        counts["importance"] = climbed(shape) * one_pass + down + 2 * head
        counts["importance"] += T * shape.total(lambda layer: layer.curvature) if shape.rows else 0
    if shape.calibrate:
        waves = shape.drift and len(shape.largest.passes) > 1  # whose passes go on from one to the next
        counts["forward"] = (3 if shape.drift and not waves else 2) * one_pass
        counts["hessian"] = T * shape.total(lambda layer: sum(group.share * group.d_in**2 for group in layer.to_solve))
    if shape.drift:
        counts["hessian"] += 2 * T * shape.total(drift_met)
        counts["drift"] = shape.total(lambda layer: sum(n**3 / 3 + 2 * m * n * n for m, n in layer.matrices))
    if shape.feedback:
        counts["factorization"] = shape.total(lambda layer: sum(2 / 3 * n**3 for _, n in layer.matrices))
        # the updates of a sweep are half a product; the certificate is a whole one
        counts["sweep"] = shape.total(lambda layer: sum(3 * m * n * n for m, n in layer.matrices))
    if shape.calibrate:
        counts["report"] = shape.total(lambda layer: sum(4 * m * n * n for m, n in layer.matrices))
    return counts


def climbed(shape: Shape) -> float:
    """The part of the layers that run forward once more before the backward pass."""
    return (shape.depth - 1) // SEGMENT * SEGMENT / shape.depth


def drift_met(layer: LayerShape) -> float:
    """Of the `drift_elements`, those that a token adds to."""
    return sum(group.share * group.stream * group.d_in for group in layer.to_solve)


def drift_elements(layer: LayerShape) -> int:
    """Elements of what ptq.calibrate.drift sums for a layer."""
    return sum(group.stream * group.d_in for group in layer.to_solve)
