"""The best K rows of every class out of any number of rows, in bounded memory, the same whatever the order in which they come."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from fastssl.errors import DataError
from fastssl.selftrain.ranking import decode, encode, hash_of, score_bits

_PIECE = 1 << 20  # rows looked at at a time
_LEAST = 1 << 16  # smallest buffer in rows
ROW_BYTES = 14  # of one buffered row with at most 65536 classes: class 2, score and id 12


@dataclass(frozen=True)
class Ranked:
    """Lists of all classes one after the other, each in order: ``cls_N`` int32, ``rank_N`` int32 (0 = best), ``score_N`` float32, ``id_N`` uint64."""

    cls_N: np.ndarray
    rank_N: np.ndarray
    score_N: np.ndarray
    id_N: np.ndarray

    def __len__(self) -> int:
        return len(self.cls_N)

    def take(self, chosen: np.ndarray) -> Ranked:
        """The rows at these places (indices or a mask)."""
        return Ranked(self.cls_N[chosen], self.rank_N[chosen], self.score_N[chosen], self.id_N[chosen])

    def counts(self, classes: int) -> np.ndarray:
        """Rows of each class, int64 [classes]."""
        return np.bincount(self.cls_N, minlength=classes)

    def digest(self) -> str:
        """sha256 (hex) of all rows."""
        digest = hashlib.sha256()
        for column, kind in ((self.cls_N, "<i4"), (self.rank_N, "<i4"), (self.score_N, "<f4"), (self.id_N, "<u8")):
            digest.update(np.ascontiguousarray(column, dtype=kind).tobytes())
        return digest.hexdigest()


class TopK:
    """A table of at most ``k`` rows per class (an int, or int [classes]) that grows by :meth:`add` and :meth:`merge` and is read by :meth:`ranked`.

    A row is (class, image id, score).  Of the same image in the same list the better score counts, so adding rows again changes nothing; merging is
    associative, commutative and idempotent.  Rows wait in a buffer of sum(k) (1 + slack) rows; when it is full every class is cut to its best k, and from
    then on rows worse than a class's k-th are dropped at the door.

    Memory: ``nbytes`` (14 bytes a row up to 65536 classes), and about 16 bytes a row more while the buffer is cut.
    """

    def __init__(self, classes: int, k: int | np.ndarray, *, seed: int = 0, slack: float = 1.0):
        self.classes, self.seed = classes, seed
        self.k_C = np.broadcast_to(np.asarray(k, dtype=np.int64), (classes,)).copy()
        if classes < 1 or self.k_C.min() < 0:
            raise DataError(f"a selection needs classes (here {classes}) and lists of at least 0 rows (here {self.k_C.min() if classes else 'none'})")
        total = int(self.k_C.sum())
        self.capacity = total + max(int(total * slack), _LEAST)
        self._cls = np.empty(self.capacity, dtype=np.uint16 if classes <= 1 << 16 else np.uint32)
        self._high = np.empty(self.capacity, dtype=np.uint64)
        self._low = np.empty(self.capacity, dtype=np.uint32)
        self._fill = 0
        self._is_cut = True
        self._bar_high = np.zeros(classes, dtype=np.uint64)  # worse rows of a class are dropped
        self._bar_bits = np.zeros(classes, dtype=np.uint32)
        self._closed = self.k_C == 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self._cls.nbytes + self._high.nbytes + self._low.nbytes + self._bar_high.nbytes + self._bar_bits.nbytes

    def add(self, cls: np.ndarray, score: np.ndarray, id_N: np.ndarray) -> int:
        """Take rows: ``cls`` integer and ``score`` float32 [N], or [N, P] for P classes of each image; ``id_N`` uint64 [N]. Returns how many passed the bar.

        Raises DataError for NaN and for classes outside 0..classes-1.
        """
        per_image = cls.shape[1] if cls.ndim == 2 else 1
        if cls.shape != score.shape or len(cls) != len(id_N):
            raise DataError(f"columns of candidates differ in length: classes {cls.shape}, scores {score.shape}, ids {id_N.shape}")
        flat_cls, flat_score, kept = cls.reshape(-1), score.reshape(-1), 0
        if flat_cls.size and (int(flat_cls.max()) >= self.classes or int(flat_cls.min()) < 0):
            raise DataError(f"a candidate has class {int(flat_cls.max())}; there are {self.classes} classes")
        for start in range(0, len(flat_cls), _PIECE):
            c, bits = flat_cls[start : start + _PIECE], score_bits(flat_score[start : start + _PIECE])
            at = np.flatnonzero((bits >= self._bar_bits[c]) & ~self._closed[c])
            high, low = encode(bits[at], id_N[(at + start) // per_image], self.seed)
            kept += self._append(c[at], high, low)
        return kept

    def merge(self, other: TopK) -> TopK:
        """Take the other table's rows; returns self. Raises DataError unless both have the same classes, k and seed."""
        if (self.classes, self.seed) != (other.classes, other.seed) or not np.array_equal(self.k_C, other.k_C):
            raise DataError("tables of different classes, k or seed cannot be merged")
        for start in range(0, other._fill, _PIECE):
            piece = slice(start, min(start + _PIECE, other._fill))
            self._append(other._cls[piece], other._high[piece], other._low[piece])
        return self

    def ranked(self) -> Ranked:
        """The lists, best first; depends on the set of rows alone."""
        self._cut()
        n = self._fill
        counts = np.bincount(self._cls[:n], minlength=self.classes)
        ends = np.cumsum(counts)
        order = np.empty(n, dtype=np.int64)
        for c in np.flatnonzero(counts):
            part = slice(ends[c] - counts[c], ends[c])
            order[part] = part.start + np.lexsort((self._low[part], self._high[part]))[::-1]
        score, ids = decode(self._high[:n][order], self._low[:n][order], self.seed)
        rank = np.arange(n) - np.repeat(ends - counts, counts)
        return Ranked(self._cls[:n].astype(np.int32), rank.astype(np.int32), score, ids)

    # --- the buffer -------------------------------------------------------------------------------------------------------------

    def _append(self, cls: np.ndarray, high: np.ndarray, low: np.ndarray) -> int:
        """Encoded rows that pass the bar go to the buffer, which is cut whenever it is full."""
        passed = 0
        while len(cls):
            good = high >= self._bar_high[cls]
            if not good.all():
                cls, high, low = cls[good], high[good], low[good]
            free = self.capacity - self._fill
            if len(cls) > free and not self._is_cut:
                self._cut()  # which raises the bar
                continue
            n = min(len(cls), free)
            here = slice(self._fill, self._fill + n)
            self._cls[here], self._high[here], self._low[here] = cls[:n], high[:n], low[:n]
            self._fill += n
            self._is_cut = self._is_cut and n == 0
            passed += n
            cls, high, low = cls[n:], high[n:], low[n:]
        return passed

    def _cut(self) -> None:
        """Sort the buffer by class and leave each class its best k, without repeated images."""
        if self._is_cut:
            return
        n = self._fill
        order = np.argsort(self._cls[:n], kind="stable")  # radix sort
        for column in (self._cls, self._high, self._low):
            column[:n] = column[:n][order]
        del order
        ends = np.cumsum(np.bincount(self._cls[:n], minlength=self.classes))
        start = to = 0
        for c, end in enumerate(ends.tolist()):
            if end > start:
                high, low = self._best(c, self._high[start:end], self._low[start:end])
                here = slice(to, to + len(high))
                self._cls[here], self._high[here], self._low[here] = c, high, low
                to = here.stop
            start = end
        self._fill, self._is_cut = to, True

    def _best(self, c: int, high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best k rows of class ``c``, in any order; raises the class's bar where there are that many."""
        hashes = hash_of(high, low)
        in_order = np.sort(hashes)
        if (in_order[1:] == in_order[:-1]).any():  # an image came twice: its better score counts
            order = np.lexsort((high, hashes))
            last = np.append(hashes[order][1:] != hashes[order][:-1], True)
            high, low = high[order[last]], low[order[last]]
        n, k = len(high), int(self.k_C[c])
        if n < k or k == 0:
            return high[: n if k else 0], low[: n if k else 0]
        bar = np.partition(high, n - k)[n - k] if n > k else high.min()
        self._bar_high[c], self._bar_bits[c] = bar, np.uint32(bar >> np.uint64(32))
        keep = high > bar
        equal = np.flatnonzero(high == bar)
        keep[equal[np.argsort(low[equal])[::-1][: k - int(keep.sum())]]] = True
        return high[keep], low[keep]
