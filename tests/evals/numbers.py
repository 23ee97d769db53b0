"""A source of numbered pictures or words, for tests of what evaluations make of their data."""

import hashlib
import io

import numpy as np
from PIL import Image

from m3ae_jax.data.sources.base import Record

SOURCE = "tests.evals.numbers:Numbers"


class Numbers:
    """Examples ``first`` to ``stop`` of one endless list; the class of number i is i modulo their count.

    The path is ``first:stop:classes``, with ``:text`` for words in place of pictures and ``:salt`` for a source that
    hides that it is the same as another. A group has three numbers in a row; every seventh is without one.
    """

    uses = frozenset({"label_key", "group_key"})

    def __init__(self, path, options):
        first, stop, classes, *more = path.split(":")
        self._first, self._stop, count = int(first), int(stop), int(classes)
        self.classes = tuple(map(str, range(count)))
        self.modalities = ("text",) if "text" in more else ("image",)
        self.fingerprint = hashlib.sha256(f"{path} {options.group_key}".encode()).hexdigest()[:16]
        self._group_key = options.group_key

    def __len__(self):
        return self._stop - self._first

    def read(self, indices):
        return [self._record(self._first + int(index)) for index in indices]

    def _record(self, number):
        record = Record(label=number % len(self.classes))
        if self.modalities == ("text",):
            record["caption"] = f"a red circle {'left of ' * (number + 1)}a blue square".encode()
        else:
            pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
            Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
            record["image"] = out.getvalue()
        if self._group_key == "concept" and number % 7:
            record["group"] = f"concept {number // 3}"
        return record


class NoClasses(Numbers):
    """Without classes, and without a key that would name them."""

    uses = frozenset()

    def __init__(self, path, options):
        super().__init__(path, options)
        self.classes = ()
