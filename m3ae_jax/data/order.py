"""Order is a function, not a process: which example stands at a draw of the run.

Within a source of ``n`` examples draw ``p`` has epoch ``p // n`` and index ``permutation(epoch)(p mod n)``.
Everything here is a pure function of (seed, draw), so resuming is starting at a draw: no state to save,
and the same answer on any number of hosts.

The permutation is TensorFlow's ``RandomIndexShuffle`` (a cycle-walking Simon block cipher) with 12 rounds;
the 4 rounds of ``tf.random.experimental.index_shuffle`` let batch-mates meet again across epochs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

ORDER_VERSION = 2
"""With crop rule 1, see `order_version`."""

ATTEMPTS = 8
"""Candidates for one draw: the first that decodes is used."""

_ROUNDS = 12


def order_version(crop_rule: int) -> int:
    """Written into every checkpoint: a run goes on only with the order, and the crops, that it began with.

    Args:
        crop_rule: ``data.crop_rule``.
    """
    return ORDER_VERSION + crop_rule - 1


def fold_seed(*parts: object) -> int:
    """Hashes any printable parts (a seed, a source's name, a purpose) to a 31-bit seed."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class RandomStream:
    """Uniform numbers in [0, 1), one after the other: a function of seed and draw alone.

    They are Philox 4x64-10's (Salmon et al. 2011), 24 bits each.
    """

    def __init__(self, seed: int, draw: int) -> None:
        self._words = np.random.Philox(key=np.array([seed, draw], np.uint64))
        self._rest = np.empty(0, np.float32)

    def take(self, count: int) -> np.ndarray:
        """The next `[count] float32`."""
        if (missing := count - len(self._rest)) > 0:
            words = self._words.random_raw((missing + 1) // 2).view(np.uint32)
            self._rest = np.append(self._rest, (words >> 8).astype(np.float32) * np.float32(2**-24))
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


def permute(index: Any, n: int, seed: Any, stream: Any = 0, attempt: Any = 0) -> Any:
    """A pseudo-random permutation of ``[0, n)``, evaluated at `index`.

    Args:
        index: `[...] int64` tensor or array in ``[0, n)``.
        n: number of elements, at least 1.
        seed: 31-bit seed.
        stream: which permutation (the epoch); same shape as `index` or a scalar, below 2^32.
        attempt: which candidate; same shape as `index` or a scalar.

    Returns:
        `[...] int64` tensor: for a fixed (seed, stream, attempt) a bijection of ``[0, n)``.
    """
    import tensorflow as tf

    index = tf.convert_to_tensor(index, tf.int64)
    if n == 1:  # the cipher needs a domain of at least two
        return tf.zeros_like(index)
    flat = tf.reshape(index, [-1])
    columns = [tf.broadcast_to(tf.reshape(tf.cast(x, tf.int64), [-1]), tf.shape(flat)) for x in (seed, stream, attempt)]
    key = tf.cast(tf.stack(columns, axis=-1) & 0xFFFFFFFF, tf.uint32)
    last = tf.fill(tf.shape(flat), tf.constant(n - 1, tf.int64))
    shuffled = tf.raw_ops.RandomIndexShuffle(index=flat, seed=key, max_index=last, rounds=_ROUNDS)
    return tf.reshape(shuffled, tf.shape(index))


@dataclasses.dataclass(frozen=True)
class Order:
    """The order in which a source is read.

    Attributes:
        n: number of examples in the source.
        seed: 31-bit seed of (run, source); see `fold_seed`.
        shuffle: False reads index ``p mod n`` at draw ``p`` (validation).
    """

    n: int
    seed: int
    shuffle: bool = True

    def index(self, draw: Any, attempt: Any = 0) -> Any:
        """The index of the example that candidate `attempt` of draw `draw` names (`[...] int64`)."""
        import tensorflow as tf

        draw = tf.convert_to_tensor(draw, tf.int64)
        within = draw % self.n
        if not self.shuffle:
            # A replacement in a fixed order is the next example: still a function of (draw, attempt).
            return (within + tf.cast(attempt, tf.int64)) % self.n
        return permute(within, self.n, self.seed, stream=draw // self.n, attempt=attempt)


def keeps_caption(index: Any, n: int, fraction: float, seed: int) -> Any:
    """Which examples keep their caption when only a share of them may have one.

    The share is of *examples*, by index, the same for the whole run: an example keeps its text if a
    permutation of its index falls into the first ``round(fraction * n)`` (paper, Figure 3: 10/20/30 %).

    Args:
        index: `[...] int64` example indices.
        n: number of examples of the source.
        fraction: share in ``[0, 1]``.
        seed: 31-bit seed.

    Returns:
        `[...] bool`.
    """
    return permute(index, n, fold_seed(seed, "caption_fraction")) < round(fraction * n)


def hidden_count(real: Any, ratio: float) -> Any:
    """How many of `real` tokens a mask ratio hides: round half up, in integers.

    Floating point would round differently in Python, NumPy and TensorFlow.

    Args:
        real: number of real tokens; an int, array or tensor of integers.
        ratio: mask ratio in ``[0, 1]``, kept to four decimals.
    """
    return (real * round(ratio * 10_000) + 5_000) // 10_000


def token_budget(tokens: int, ratio: float) -> tuple[int, int]:
    """The static slots (visible, target) that hold any example of up to `tokens` real tokens."""
    counts = np.arange(tokens + 1)
    hidden = hidden_count(counts, ratio)
    return int((counts - hidden).max()), int(hidden.max())
