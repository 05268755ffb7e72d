"""The calibration tokens' passes through one layer, which go on from wave to wave.

    for wave in the layer's waves:
        each batch runs on until the wave's linears have been observed, and pauses
        the wave is quantized

So a layer is run once for all its waves, and in the original once more.  A paused pass holds what its layer's code holds then:
of a Llama layer at most the residual stream and the input of down_proj.  Where there is no memory for that, or was none once, a
pass is let go, and runs again from the layer's input; the result is the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ptq.calibrate.activations import Activations, each_batch
from ptq.calibrate.observe import LayerPass
from ptq.runtime.adapter import Adapter, Layer, LayerPlan
from ptq.runtime.distributed import Ranks
from ptq.runtime.memory import free_share

# Of the device's memory, what paused passes leave to the sums and the solve of a wave.
RESERVE = 0.4


@dataclass
class Original:
    """The layer as it was, and what the original model puts into it."""

    layer: Layer
    hidden: Activations


@dataclass
class Stream:
    """The calibration tokens on their way through the model.  `importance`: what each counts for, by the full name of a
    group's first linear, (sequences, length); empty where all count the same.  `sequences`: of all `ranks`.
    `all_tokens`: experts are calibrated on all tokens, not only on those routed to them."""

    hidden: Activations
    ranks: Ranks
    sequences: int
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    original: Original | None = None
    all_tokens: bool = False


class Passes:
    """Of the stream's sequences through the layer and, where drift is made good, through the original's.

    `keep_ours`, `keep_theirs`: whether they are kept until they have ended.  What ours ran before a pause must not change later,
    so the layer has to be quantized wave by wave then; the original does not change.
    """

    def __init__(
        self,
        adapter: Adapter,
        layer: Layer,
        plan: LayerPlan,
        stream: Stream,
        *,
        keep_ours: bool = False,
        keep_theirs: bool = False,
    ):
        self.adapter, self.layer, self.plan, self.stream = adapter, layer, plan, stream
        self._keep = keep_ours, keep_theirs
        self._paused: dict[tuple[int, int], list[LayerPass | None]] = {}
        self._running: list[LayerPass] = []
        self._batch = stream.hidden.batch

    def take(self, rows: slice) -> list[LayerPass]:
        """That of the quantized model, and that of the original if it comes along; new ones where none was kept."""
        if self._batch != self.stream.hidden.batch:
            self.clear()
        original = self.stream.original
        begin = [self._begin_ours, self._begin_theirs] if original else [self._begin_ours]
        kept = self._paused.get((rows.start, rows.stop)) or [None] * len(begin)
        self._running = [one or new(rows) for one, new in zip(kept, begin, strict=True)]
        self._paused.pop((rows.start, rows.stop), None)
        return self._running

    def put_back(self, rows: slice, passes: list[LayerPass]) -> None:
        """To go on later, if they can and there is memory for it, which there is not where it ran out once; of a pair that stands
        at a wave both or none."""
        self._running = []
        keep = [keep for keep, _ in zip(self._keep, passes, strict=False)]
        whole = all(one.can_finish for one, wanted in zip(passes, keep, strict=True) if wanted)
        hidden = self.stream.hidden
        if not whole or not any(keep) or hidden.halved or free_share(hidden.device) <= RESERVE:
            close(passes)
            return
        close([one for one, wanted in zip(passes, keep, strict=True) if not wanted])
        self._paused[rows.start, rows.stop] = [one if wanted else None for one, wanted in zip(passes, keep, strict=True)]

    def clear(self) -> None:
        """All begin again, and nothing is held of those that ran, nor of one that failed: a paused pass is on its own stack,
        and so would never be collected."""
        for passes in [*self._paused.values(), self._running]:
            close([one for one in passes if one])
        self._paused.clear()
        self._running = []
        self._batch = self.stream.hidden.batch

    def finish(self) -> None:
        """The layer's input becomes its output, in both models."""
        original = self.stream.original
        states = [self.stream.hidden, original.hidden] if original else [self.stream.hidden]

        def work(rows: slice) -> None:
            passes = self.take(rows)
            outputs = [one.finish() for one in passes]
            close(passes)
            for hidden, output in zip(states, outputs, strict=True):
                hidden.store(rows, output)

        each_batch(self.stream.hidden, "forward", work)

    def _begin_ours(self, rows: slice) -> LayerPass:
        return LayerPass(self.adapter, self.layer, self.plan, self.stream.hidden.load(rows))

    def _begin_theirs(self, rows: slice) -> LayerPass:
        original = self.stream.original
        assert original
        frozen = not self.plan.last  # of which no output is wanted
        return LayerPass(self.adapter, original.layer, self.plan, original.hidden.load(rows), frozen=frozen)


def close(passes: list[LayerPass]) -> None:
    for one in passes:
        one.close()
