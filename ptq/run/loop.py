"""The loop: layer by layer through a model, each layer calibrated on the output of the quantized ones before it.

    for layer in adapter.layers():
        collect the sums of its groups of linears, wave by wave; solve each matrix; put the result in its place
        run the quantized layer to its end to get the next one's input

One layer's Hessians are alive at a time, and layers are asked of the adapter one by one.  Where drift is made good
(ptq.calibrate.drift), the original model's hidden states come along.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ptq.calibrate.activations import embed_all
from ptq.calibrate.collect import Sums, collect
from ptq.calibrate.importance import TokenImportance
from ptq.calibrate.inputs import Inputs, calibrate_inputs, quantized_inputs
from ptq.calibrate.norms import fused_norms
from ptq.calibrate.passes import Original, Passes, Stream
from ptq.calibrate.validation import Validation
from ptq.core.packing import Quantized
from ptq.run.batch import Batch, Shards, batches_of, owners_of
from ptq.run.curvature import Ahead
from ptq.run.embedding import quantize_embedding
from ptq.run.plan import Matrix, Pass, Plan, make_plan
from ptq.run.recipe import Recipe, Rules
from ptq.run.record import LayerResult, Record, make_record
from ptq.run.smoothing import Rescaled, smooth
from ptq.run.solve import SolvedRows, gather, solve_matrices, take_statistics
from ptq.runtime.adapter import Adapter, Layer, LayerPlan
from ptq.runtime.checks import check_float32
from ptq.runtime.clock import phase
from ptq.runtime.distributed import Ranks, shard_rows

SumsOf = Callable[[Layer, LayerPlan, Pass, Shards], Sequence[Sums | None]]
Restore = Callable[[Layer], tuple[int, Inputs]]


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on; all of it is this rank's.

    `batches`: token ids (n, length) each, on the model's device; none for methods that need no calibration.
    `importance`: for the same batches, what each token counts for in H (ptq.calibrate.importance); every token the same
    without.  `curvature`: by linear, G for row feedback, packed.  `validation`: token ids (n, length) to measure errors on, the
    same on all ranks.  `all_tokens`: a mixture's experts are calibrated on all tokens, not only on those routed to them.
    """

    batches: Sequence[Tensor] = ()
    importance: TokenImportance | None = None
    curvature: Mapping[str, Tensor] | None = None
    validation: Tensor | None = None
    all_tokens: bool = False


def quantize_model(
    adapter: Adapter, recipe: Recipe | Rules, calibration: Calibration | None = None, *, ignore: Sequence[str] = ()
) -> Iterator[tuple[Record, Quantized]]:
    """Quantizes the model in place and yields (record, weight) for each linear as its layer is done.

    `recipe`: one for all linears, or rules (ptq.run.recipe).  Raises ValueError, before any work, for whatever `make_plan`
    finds, and later for non-finite activations or an H that damping does not cure, naming the linears; CertificateError where
    the loss identity fails.
    """
    plan = make_plan(adapter, recipe, ignore)
    for done in quantize_layers(adapter, plan, calibration or Calibration()):
        yield from ((record, done.quantized[record.name]) for record in done.records)


@torch.no_grad()
def quantize_layers(
    adapter: Adapter,
    plan: Plan,
    calibration: Calibration,
    *,
    ranks: Ranks | None = None,
    finished: int = -1,
    restore: Restore | None = None,
    on_host: bool | None = None,
    sums_of: SumsOf | None = None,
) -> Iterator[LayerResult]:
    """Quantizes layer by layer, each as the adapter gives it; what `quantize_model` says holds here.

    Layers before number `finished`, the embeddings being -1, are not quantized but restored from disk by `restore`, which returns
    the batch size they were calibrated with and their quantized inputs.
    `sums_of`: where sums come from if not from the calibration's tokens (ptq.run.shared_hessians).
    """
    check_float32()
    check_calibration(plan, calibration, sums_of)
    if plan.untied:
        adapter.untie()
    loop = LayerLoop(adapter, plan, calibration, ranks or Ranks(), on_host, sums_of)
    first = 0 if loop.stream else max(finished, 0)
    if plan.first < 0:
        kept = restore if finished > plan.first else None
        yield from quantize_embedding(adapter, plan.recipes, calibration.batches, loop.stream, loop.validation, kept)
    try:
        for layer in adapter.layers(range(first, len(plan.layers))):
            with fused_norms(layer.module):
                loop.begin(layer, finished=layer.index < finished)
                if layer.index < finished:
                    assert restore
                    loop.restore(layer, restore)
                else:
                    yield loop.quantize(layer)
                loop.advance(layer)
    finally:
        if loop.passes:
            loop.passes.clear()


def check_calibration(plan: Plan, calibration: Calibration, sums_of: SumsOf | None) -> None:
    """Raises ValueError where the plan needs what the calibration lacks."""
    if plan.needs_calibration and not calibration.batches and not sums_of:
        recipe = plan.recipes[plan.needs_calibration]
        inputs = f" on activations in {recipe.activation.name}" if recipe.activation else ""
        raise ValueError(f"method {recipe.method} with scale rule {recipe.rule}{inputs} needs calibration tokens")
    if plan.row_feedback and calibration.curvature is None:
        raise ValueError(
            "row feedback needs the curvature of the loss in every linear's outputs; give what token_importance leaves"
        )
    if plan.drift and sums_of:
        raise ValueError("drift is of one run of quantized layers; Hessians that several methods share know of none")
    if plan.activations and sums_of:
        raise ValueError("Hessians that several methods share are of activations as they are; leave activations out")


class LayerLoop:
    """What goes from layer to layer: the calibration tokens' hidden states, the original's, and those to validate on."""

    def __init__(
        self,
        adapter: Adapter,
        plan: Plan,
        calibration: Calibration,
        ranks: Ranks,
        on_host: bool | None = None,
        sums_of: SumsOf | None = None,
    ):
        self.adapter, self.plan, self.ranks = adapter, plan, ranks
        self.curvature = self.known_curvature = self.ahead = calibration.curvature or {}
        self.stream = open_stream(adapter, calibration, ranks, on_host) if calibration.batches else None
        self.sums_of = sums_of or self.collect
        self.validation = None
        if calibration.validation is not None:
            batch = self.stream.hidden.batch if self.stream else len(calibration.validation)
            self.validation = Validation(adapter, calibration.validation, batch)
        self.beside = self.stream.hidden.copy(on_host) if self.stream and plan.drift else None
        self.passes: Passes | None = None
        self.original: Layer | None = None
        self.inputs: Inputs = {}

    def begin(self, layer: Layer, *, finished: bool) -> None:
        """Scales its channels, unless it is `finished` and comes scaled from the disk, and keeps the layer as it is before it is
        quantized, where that is needed."""
        if self.stream and not finished:
            with phase("forward"):
                scaled = smooth(self.adapter, layer, self.plan.layers[layer.index], self.plan.recipes, self.stream)
            self.curvature = Rescaled(self.known_curvature, scaled) if scaled else self.known_curvature
        if self.beside or self.validation:
            self.original = replace(layer, module=copy.deepcopy(layer.module))
        if self.stream:
            if self.beside:
                assert self.original
                self.stream.original = Original(self.original, self.beside)
            plan, several = self.plan.layers[layer.index], len(self.plan.passes[layer.index]) > 1
            self.passes = Passes(self.adapter, layer, plan, self.stream, keep_ours=several, keep_theirs=not plan.last)

    def restore(self, layer: Layer, restore: Restore) -> None:
        """Makes the layer what it was after it had been quantized."""
        assert self.stream
        self.stream.hidden.batch, self.inputs = restore(layer)
        self.validate(layer)

    def quantize(self, layer: Layer) -> LayerResult:
        result = LayerResult(layer, self.stream.hidden.batch if self.stream else 0)
        plan = self.plan.layers[layer.index]
        with phase("forward"):
            self.inputs = calibrate_inputs(self.adapter, layer, plan, self.plan.inputs(layer), self.stream)
        for groups in self.plan.passes[layer.index]:
            matrices = [matrix for group in groups for matrix in group.matrices]
            divisible = not any(matrix.recipe.row_feedback for matrix in matrices)
            shards = shard_rows([matrix.shape for matrix in matrices], self.ranks, divisible=divisible)
            own = [matrix for matrix, shard in zip(matrices, shards, strict=True) if shard[self.ranks.rank]]
            fed = [layer.full_name(name) for matrix in own if matrix.recipe.row_feedback for name in matrix.names]
            self.ahead = Ahead(self.curvature, fed, next(layer.module.parameters()).device)
            with phase("forward"), quantized_inputs(layer.module, self.inputs):
                sums = list(self.sums_of(layer, plan, groups, shards))
            self.solve(layer, groups, sums, shards, result)
        errors = self.validate(layer)
        known = [replace(one, validation_error=errors.get(one.name)) for one in result.records]
        return replace(result, records=known, batch=self.stream.hidden.batch if self.stream else 0)

    def collect(self, _layer: Layer, _plan: LayerPlan, groups: Pass, shards: Shards) -> Sequence[Sums | None]:
        """Of each group, from the tokens on their way through the layer; None without any."""
        if self.passes is None:
            return [None] * len(groups)
        return collect(self.passes, [group.names for group in groups], owners_of(groups, shards))

    def solve(self, layer: Layer, groups: Pass, sums: list[Sums | None], shards: Shards, result: LayerResult) -> None:
        """Solves the matrices, each rank its rows, and puts the results into the linears of every rank."""
        solved: list[tuple[Batch, list[SolvedRows | None]]] = []
        for batch in batches_of(groups, shards):
            own = [sums[number] for number in batch.numbers]
            for number in batch.numbers:
                sums[number] = None
            solved.append((batch, self.solve_batch(layer, batch, own)))
            del own
        found: dict[tuple[int, int], list[tuple[Record, Quantized]]] = {}
        for batch, parts in solved:
            for place, rows in enumerate(parts):
                matrices = [group.matrices[place] for group in batch.groups]
                each = self.put_in_place(layer, matrices, rows, batch.shards[place])
                found |= {(number, place): linears for number, linears in zip(batch.numbers, each, strict=True)}
        for key in sorted(found):
            for record, weight in found[key]:
                result.records.append(record)
                result.quantized[record.name] = weight

    def put_in_place(
        self, layer: Layer, matrices: Sequence[Matrix], solved: SolvedRows | None, shard: list[range]
    ) -> list[list[tuple[Record, Quantized]]]:
        """The linears of a batch of matrices become what ranks made of them.  Of each matrix, what is known of its linears."""
        with phase("communicate"):
            like = layer.linear(matrices[0].names[0]).weight
            whole, stats, facts = gather(matrices[0], len(matrices), like, solved, shard, self.ranks)
        Q = whole.dequantize()
        found = []
        for number, matrix in enumerate(matrices):
            found.append([])
            start = 0
            for name, row in zip(matrix.names, stats[number], strict=True):
                linear, full = layer.linear(name), layer.full_name(name)
                stop = start + linear.out_features
                linear.weight.copy_(Q[number, start:stop])
                record = make_record(full, linear, row, facts[number], matrix.recipe)
                found[-1].append((record, self.stored(whole.rows(number, start, stop), name, matrix.recipe)))
                start = stop
        return found

    def stored(self, weight: Quantized, name: str, recipe: Recipe) -> Quantized:
        """With what a checkpoint says of the inputs of the linear `name`."""
        scale = self.inputs[name].global_scale if name in self.inputs else None
        return replace(weight, format=recipe.stored, input_scale=scale)

    def solve_batch(self, layer: Layer, batch: Batch, sums: list[Sums | None]) -> list[SolvedRows | None]:
        """This rank's rows of the matrices of each group, one matrix of all after the other; the sums are used up."""
        own = [shard[self.ranks.rank] for shard in batch.shards]
        known = [one for one in sums if one]
        try:
            statistics = take_statistics(known) if known and any(own) else None
            solved: list[SolvedRows | None] = []
            for matrices, rows in zip(zip(*(group.matrices for group in batch.groups), strict=True), own, strict=True):
                linears = [{layer.full_name(name): layer.linear(name) for name in matrix.names} for matrix in matrices]
                solve = partial(solve_matrices, matrices[0], linears, statistics, self.ahead, rows, self.ranks)
                solved.append(solve() if rows else None)
        except ValueError as error:
            for one, its in zip(batch.alone(), sums, strict=False):  # which it was, it says by itself
                self.solve_batch(layer, one, [its])
            raise type(error)(f"{batch.names(layer)}: {error}") from None
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise torch.OutOfMemoryError(
                f"out of memory in phase 'solve' of {batch.names(layer)}, for matrices of {batch.groups[0].matrices[0].d_in}²; set "
                f"--hidden-states host, or leave this group to more memory with --ignore ({reason})"
            ) from error
        return solved

    def validate(self, layer: Layer) -> dict[str, float]:
        """By full name, how far each linear's outputs are off on the validation sequences."""
        if self.validation is None:
            return {}
        assert self.original
        with phase("report"), quantized_inputs(layer.module, self.inputs):
            errors = self.validation.measure(self.original, layer, self.plan.layers[layer.index])
        return {layer.full_name(name): error for name, error in errors.items()}

    def advance(self, layer: Layer) -> None:
        """The layer's input becomes its output, in both models."""
        if self.stream and self.passes and not self.plan.layers[layer.index].last:
            with phase("forward"), quantized_inputs(layer.module, self.inputs):
                self.passes.finish()
            self.stream.original = None
        self.passes = self.original = None


def open_stream(adapter: Adapter, calibration: Calibration, ranks: Ranks, on_host: bool | None) -> Stream:
    device = calibration.batches[0].device
    sequences = round(ranks.all_reduce_value(sum(len(tokens) for tokens in calibration.batches), device))
    hidden = embed_all(adapter, calibration.batches, on_host, ranks.local_groups(sequences))
    importance = {name: torch.cat(parts) for name, parts in (calibration.importance or {}).items()}
    return Stream(hidden, ranks, sequences, importance, all_tokens=calibration.all_tokens)
