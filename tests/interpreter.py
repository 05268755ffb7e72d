"""Triton's interpreter with less to do for each operation: it works out the types of every result anew, most of its time.

Nothing here changes what is computed; a version of Triton that lacks one of the places runs as it is.
"""

import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def make_quicker() -> None:
    interpreter._patch_lang = patch_once(interpreter._patch_lang)
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
    interpreter.ReduceOps.generic_reduce = by_slices(interpreter.ReduceOps.generic_reduce)
    TritonSemantic.binary_op_type_checking_impl = with_numbers_known(
        unless_of_one_type(TritonSemantic.binary_op_type_checking_impl)
    )
    TritonSemantic.binary_op_sanitize_overflow_impl = if_debugging(TritonSemantic.binary_op_sanitize_overflow_impl)
    TritonSemantic.broadcast_impl_value = unless_alike(TritonSemantic.broadcast_impl_value)
    tl.core.block_type.to_ir = once_a_type(tl.core.block_type.to_ir)
    tl.core.block_type.__init__ = alike_are_one(tl.core.block_type.__init__)
    tl.core.tensor.__init__ = with_shape_of_type(tl.core.tensor.__init__)


def patch_once(patch: Callable) -> Callable:
    """triton.language is patched at the launch and again in every call of a helper: not where the helper sees it patched."""

    @cache
    def languages(fn: Callable) -> list[ModuleType]:
        return [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]

    def quicker(fn: Callable) -> Any:
        seen = languages(fn)
        patched = seen and not any(tl.core.is_builtin(module.load) for module in seen)
        return interpreter._LangPatchScope() if patched else patch(fn)

    return quicker


def by_name(np_dtype: Callable) -> Callable:
    known: dict[str, Any] = {}

    def quicker(dtype: tl.dtype) -> Any:
        if dtype.name not in known:
            known[dtype.name] = np_dtype(dtype)
        return known[dtype.name]

    return quicker


def alike(lhs: tl.tensor, rhs: tl.tensor) -> bool:
    return lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values


def unless_alike(broadcast: Callable) -> Callable:
    def quicker(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple:
        return (lhs, rhs) if alike(lhs, rhs) else broadcast(self, lhs, rhs)

    return quicker


def unless_of_one_type(check: Callable) -> Callable:
    """Whether two blocks of one type come back as they are is asked once a type."""
    unchanged: dict[tuple, bool] = {}

    def quicker(self: TritonSemantic, lhs: Any, rhs: Any, *rules: bool, **more: bool) -> tuple:
        if not (type(lhs) is type(rhs) is tl.tensor and lhs.dtype.name == rhs.dtype.name and alike(lhs, rhs)):
            return check(self, lhs, rhs, *rules, **more)
        asked = lhs.dtype.name, rules, *more.items()
        if unchanged.get(asked):
            return lhs, rhs
        checked = check(self, lhs, rhs, *rules, **more)
        unchanged[asked] = checked[0] is lhs and checked[1] is rhs
        return checked

    return quicker


def with_numbers_known(check: Callable) -> Callable:
    """What a number becomes beside a block is worked out once for each number and type."""
    known: dict[tuple, tl.tensor] = {}

    def quicker(self: TritonSemantic, lhs: Any, rhs: Any, *rules: bool, **more: bool) -> tuple:
        if type(rhs) not in (int, float) or type(lhs) is not tl.tensor or not lhs.type.is_block():
            return check(self, lhs, rhs, *rules, **more)
        asked = str(rhs), type(rhs), lhs.dtype.name, *lhs.type.shape.values, rules, *more.items()
        if asked in known:
            return lhs, known[asked]
        checked = check(self, lhs, rhs, *rules, **more)
        if checked[0] is lhs:
            known[asked] = checked[1]
        return checked

    return quicker


def if_debugging(check: Callable) -> Callable:
    """Overflow is otherwise worked out for an assertion that is not made."""

    def quicker(self: TritonSemantic, *arguments: Any) -> None:
        if self.builder.options.debug:
            check(self, *arguments)

    return quicker


def by_slices(reduce: Callable) -> Callable:
    """A function of our own combines all rows at once, as it does on a GPU, and not number by number."""

    def quicker(self: interpreter.ReduceOps, given: tuple) -> list:
        if self.axis is None or given[0].handle.data.ndim == 1:
            return reduce(self, given)

        def tensors(arrays: list) -> list:
            return [self.to_tensor(array, one.dtype) for array, one in zip(arrays, given, strict=True)]

        def at(place: int) -> list:
            return tensors([one.handle.data.take(place, self.axis) for one in given])

        found = at(0)
        for place in range(1, given[0].handle.data.shape[self.axis]):
            combined = self.combine_fn.fn(*found, *at(place))
            found = tensors([one.handle.data for one in (combined if isinstance(combined, tuple) else (combined,))])
        return tensors([np.expand_dims(one.handle.data, self.axis) for one in found]) if self.keep_dims else found

    return quicker


def once_a_type(to_ir: Callable) -> Callable:
    def quicker(self: Any, builder: object) -> object:
        if not hasattr(self, "known_ir"):
            self.known_ir = to_ir(self, builder)
        return self.known_ir

    return quicker


def alike_are_one(init: Callable) -> Callable:
    """Of all block types alike, what is known of one is known of each."""
    known: dict[tuple, dict] = {}

    def quicker(self: Any, element_ty: tl.dtype, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        key = id(element_ty) if element_ty.is_ptr() else element_ty.name, sizes
        if key in known:
            self.__dict__ = known[key]
        else:
            init(self, element_ty, shape)
            known[key] = self.__dict__

    return quicker


def with_shape_of_type(init: Callable) -> Callable:
    def quicker(self: Any, handle: object, type: Any) -> None:
        if hasattr(type, "known_shape"):
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = type.known_shape
        else:
            init(self, handle, type)
            type.known_shape = self.shape, self.numel

    return quicker
