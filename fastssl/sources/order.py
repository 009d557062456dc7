"""Which index comes when: order laws as pure functions of (seed, position) on an infinite global sequence.

A stream's list of N rows is visited along a sequence of *positions* 0, 1, 2, ... that is shared by all ranks.  Update t reads the
positions [t*B, (t+1)*B) with B the global batch, and rank r of R takes the r-th contiguous piece of them (:func:`rank_slots`).  A law
says which index in [0, N) stands at a position; it knows nothing of ranks, workers or what was read before, so resuming at any step and
changing the number of processes cannot change what is seen.

Laws:

=====================  ================================================================================================================
``shuffle``            A fresh permutation for every N positions, one after the other: each index exactly once per N draws.
``restart_drop_last``  A fresh permutation per pass; the last incomplete global batch of the pass is dropped (an ordinary shuffling
                       loader with ``drop_last`` that is restarted when it is exhausted).
``with_replacement``   Independent uniform draws.
``fixed_permutation``  One permutation, repeated.
``sequential``         0, 1, ..., N-1, repeated.
``distributed``        ``torch.utils.data.DistributedSampler``: torch's CPU permutation seeded with ``seed + epoch``, wrapped around to a
                       multiple of ``replicas``, dealt out in strides.
``mc_cifar``           ``epoch_length`` draws per epoch from one generator seeded with ``seed + epoch``: as many full permutations as fit,
                       then the remainder uniformly *with replacement*; dealt out in strides (the CIFAR sampler of ShrinkMatch's code).
``v2_labelled``        Like ``mc_cifar``, but the remainder is the beginning of one more permutation (SimMatchV2's labelled sampler).
=====================  ================================================================================================================

The first five are ours: they use only raw Philox words and stable sorting, so that a seed means the same order with every version of
NumPy.  The last three reproduce published index sequences exactly, hence they depend on torch's generator, are seeded by ``seed`` alone
(published: 0) and ignore the ``stream`` tag.
"""

from __future__ import annotations

import ast
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from fastssl.errors import RecipeError, nearest

_BLOCK = 4096  # positions per generator of with_replacement
_CACHE_FROM = 16384  # shorter tables are cheaper to redraw than to let them push long ones out of the cache


@dataclass(frozen=True)
class Order:
    """A law applied to a list of ``length`` indices.

    ``batch`` is the global batch; ``restart_drop_last`` and the three torch laws need it.  ``stream`` separates streams that share a seed
    (any text, usually the stream's name).  The other fields are for the torch laws only:

    ``replicas``: number of processes of the published run. The global batch is laid out process after process, i.e. with ``replicas``
    ranks each rank reads exactly what the published rank read, and with one rank the batch is the published ranks' batches end to end
    (the row groups that grouped BatchNorm wants).  ``epoch_length``: draws per epoch over all replicas (``mc_cifar``, ``v2_labelled``).
    ``drop_last`` (``distributed``): drop the last incomplete batch of a pass, else batches run over the end of a pass.
    ``epoch_steps`` (``distributed`` with ``drop_last``): updates per training epoch; at each epoch E the loader is made anew and its
    generator epochs count from E * ceil(epoch_steps / batches per pass) (SimMatch's labelled loader). 0 = passes follow each other.
    ``fixed_epoch`` (``distributed``): the generator's epoch stays 0, every pass repeats the first (ACR's loader on one GPU).

    Raises :class:`RecipeError` for unknown laws and impossible sizes.
    """

    law: str
    length: int
    seed: int = 0
    batch: int = 1
    stream: str = ""
    replicas: int = 1
    epoch_length: int = 0
    drop_last: bool = True
    epoch_steps: int = 0
    fixed_epoch: bool = False

    def __post_init__(self) -> None:
        if self.law not in _LAWS:
            raise RecipeError(f"unknown order law {self.law!r}{nearest(self.law, _LAWS)}; laws: {', '.join(_LAWS)}")
        if self.length < 1:
            raise RecipeError(f"order law {self.law!r} on an empty list of rows; check the label split")
        if self.seed < 0 or self.batch < 1 or self.replicas < 1:
            got = f"seed={self.seed} batch={self.batch} replicas={self.replicas}"
            raise RecipeError(f"order law {self.law!r}: seed must be >= 0, batch and replicas >= 1, got {got}")
        if self.law == "restart_drop_last" and self.length < self.batch:
            raise RecipeError(
                f"order law 'restart_drop_last' drops incomplete batches, but {self.length} rows never fill a batch of {self.batch}; use 'shuffle'"
            )
        if self.law in _TORCH_LAWS:
            _check_torch_law(self)

    @property
    def pass_length(self) -> int:
        """Positions after which the law starts over with a fresh table (for ``with_replacement``: an internal block size)."""
        if self.law == "restart_drop_last":
            return self.length // self.batch * self.batch
        if self.law == "with_replacement":
            return _BLOCK
        if self.law == "distributed":
            share = math.ceil(self.length / self.replicas)
            per_rank = self.batch // self.replicas
            return self.replicas * (share // per_rank * per_rank if self.drop_last else share)
        if self.law in _TORCH_LAWS:
            return self.epoch_length
        return self.length


def parse_order(spec: str, **defaults: Any) -> Order:
    """``"shuffle"`` or ``"mc_cifar(replicas=8, epoch_length=65536)"`` -> :class:`Order`; options in the text win over ``defaults``.

    >>> parse_order("distributed(replicas=8)", length=50000, seed=0, batch=448).replicas
    8
    """
    name, bracket, inside = spec.strip().partition("(")
    options = dict(defaults)
    valid = [f.name for f in fields(Order) if f.name not in ("law", "length")]
    if bracket:
        try:
            call = ast.parse(spec.strip(), mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                raise ValueError("not name=value")
            given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, ValueError) as error:
            raise RecipeError(f"order law {spec!r} cannot be read; write e.g. distributed(replicas=8, drop_last=True)") from error
        for key, value in given.items():
            if key not in valid:
                raise RecipeError(f"order law {spec!r} has no option {key!r}{nearest(str(key), valid)}; options: {', '.join(valid)}")
            if type(value) is not type(getattr(Order, str(key))):
                raise RecipeError(f"order law {spec!r}: option {key!r} wants {type(getattr(Order, str(key))).__name__}, got {value!r}")
            options[str(key)] = value
    return Order(law=name.strip(), **options)


def indices(order: Order, start: int, count: int) -> np.ndarray:
    """Indices at positions [start, start + count) of the global sequence: int64 [count], each in [0, order.length). Pure."""
    if start < 0 or count < 0:
        raise ValueError(f"positions start at 0, got start={start} count={count}")
    return _LAWS[order.law](order, np.arange(start, start + count, dtype=np.int64))


def rank_slots(step: int, global_batch: int, world: int = 1, rank: int = 0) -> tuple[int, int]:
    """(first position, number of positions) that ``rank`` of ``world`` reads at update ``step`` (0-based).

    Raises :class:`RecipeError`, naming the world sizes that would do, when the batch cannot be shared equally.
    """
    if global_batch < 1 or world < 1:
        raise RecipeError(f"a global batch of {global_batch} over {world} processes makes no sense; both must be >= 1")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not in [0, {world})")
    if global_batch % world:
        divisors = [d for d in range(1, min(global_batch, 1024) + 1) if global_batch % d == 0]
        raise RecipeError(
            f"a global batch of {global_batch} cannot be shared equally by {world} processes; "
            f"use a number of processes out of {', '.join(map(str, divisors))}, or change the batch"
        )
    share = global_batch // world
    return step * global_batch + rank * share, share


# --- our laws -------------------------------------------------------------------------------------------------------------------


def _words(count: int, *key: int) -> np.ndarray:
    """``count`` uniform uint64 words of the generator keyed by ``key``; the raw stream of Philox is fixed for good."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def _draw_permutation(length: int, *key: int) -> np.ndarray:
    # stable: in the (practically impossible) case of equal words the result must still not depend on the sorting algorithm
    return np.argsort(_words(length, *key), kind="stable").astype(np.int32 if length < 2**31 else np.int64)


@lru_cache(maxsize=8)
def _cached_permutation(length: int, *key: int) -> np.ndarray:
    return _draw_permutation(length, *key)


def _permutation(order: Order, number: int) -> np.ndarray:
    draw = _draw_permutation if order.length < _CACHE_FROM else _cached_permutation
    return draw(order.length, order.seed, zlib.crc32(order.stream.encode()), 0, number)


def _by_pass(passes: np.ndarray, offsets: np.ndarray, table: Callable[[int], np.ndarray]) -> np.ndarray:
    """table(pass)[offset] for every element; each pass's table is made once."""
    out = np.empty(len(passes), dtype=np.int64)
    for number in np.unique(passes):
        here = passes == number
        out[here] = table(int(number))[offsets[here]]
    return out


def _passes(order: Order, positions: np.ndarray) -> np.ndarray:
    """``shuffle`` and ``restart_drop_last``: a fresh permutation per pass, of which the first ``pass_length`` entries are used."""
    return _by_pass(positions // order.pass_length, positions % order.pass_length, lambda number: _permutation(order, number))


def _with_replacement(order: Order, positions: np.ndarray) -> np.ndarray:
    def block(number: int) -> np.ndarray:  # a 64-bit word modulo N: the bias N / 2^64 is beyond measurement
        return _words(_BLOCK, order.seed, zlib.crc32(order.stream.encode()), 1, number) % np.uint64(order.length)

    return _by_pass(positions // _BLOCK, positions % _BLOCK, block)


def _fixed_permutation(order: Order, positions: np.ndarray) -> np.ndarray:
    return _permutation(order, 0)[positions % order.length].astype(np.int64)


def _sequential(order: Order, positions: np.ndarray) -> np.ndarray:
    return positions % order.length


# --- torch's laws ---------------------------------------------------------------------------------------------------------------


def _check_torch_law(order: Order) -> None:
    if order.batch % order.replicas:
        raise RecipeError(f"order law {order.law!r}: a global batch of {order.batch} is not a multiple of replicas={order.replicas}")
    if order.law == "distributed":
        if order.pass_length == 0:
            raise RecipeError(
                f"order law 'distributed' with drop_last: {order.length} rows on {order.replicas} replicas never fill a batch of {order.batch}; "
                "set drop_last=False or use 'shuffle'"
            )
        if order.epoch_steps and not order.drop_last:
            raise RecipeError("order law 'distributed': epoch_steps needs drop_last=True")
    elif order.epoch_length < 1 or order.epoch_length % order.batch:
        raise RecipeError(
            f"order law {order.law!r} needs epoch_length, a multiple of the global batch {order.batch} "
            f"(published: updates per epoch times batch), got {order.epoch_length}"
        )


def _torch_table(order: Order, epoch: int) -> np.ndarray:
    """The published epoch list that ranks read in strides."""
    draw = _draw_torch_table if max(order.length, order.epoch_length) < _CACHE_FROM else _cached_torch_table
    return draw(order.law, order.length, order.replicas, order.epoch_length, order.seed + epoch)


def _draw_torch_table(law: str, length: int, replicas: int, epoch_length: int, seed: int) -> np.ndarray:
    generator = torch.Generator()
    generator.manual_seed(seed)
    if law == "distributed":
        table = torch.randperm(length, generator=generator).numpy()
        return np.resize(table, math.ceil(length / replicas) * replicas)  # np.resize repeats from the start, as the sampler's padding does
    full, rest = divmod(epoch_length, length)
    parts = [torch.randperm(length, generator=generator) for _ in range(full)]
    if law == "mc_cifar":
        parts.append(torch.randint(length, (rest,), generator=generator))
    else:
        parts.append(torch.randperm(length, generator=generator)[:rest])
    return torch.cat(parts).numpy()


@lru_cache(maxsize=4)
def _cached_torch_table(law: str, length: int, replicas: int, epoch_length: int, seed: int) -> np.ndarray:
    return _draw_torch_table(law, length, replicas, epoch_length, seed)


def _strided(order: Order, positions: np.ndarray) -> np.ndarray:
    """Position -> (step, published rank, slot of that rank) -> (epoch, entry of the rank's strided share of the epoch's list)."""
    share = order.batch // order.replicas  # rows per step of one published rank
    step, in_batch = np.divmod(positions, order.batch)
    rank, slot = np.divmod(in_batch, share)
    per_epoch = order.pass_length // order.replicas  # entries of one rank per pass
    if order.epoch_steps:
        batches = per_epoch // share
        era, in_era = np.divmod(step, order.epoch_steps)
        epoch = era * math.ceil(order.epoch_steps / batches) + in_era // batches
        entry = in_era % batches * share + slot
    else:
        epoch, entry = np.divmod(step * share + slot, per_epoch)
    if order.fixed_epoch:
        epoch = np.zeros_like(epoch)
    return _by_pass(epoch, entry * order.replicas + rank, lambda number: _torch_table(order, number))


_TORCH_LAWS = ("distributed", "mc_cifar", "v2_labelled")
_LAWS: dict[str, Callable[[Order, np.ndarray], np.ndarray]] = {
    "shuffle": _passes,
    "restart_drop_last": _passes,
    "with_replacement": _with_replacement,
    "fixed_permutation": _fixed_permutation,
    "sequential": _sequential,
    "distributed": _strided,
    "mc_cifar": _strided,
    "v2_labelled": _strided,
}
