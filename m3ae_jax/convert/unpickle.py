"""Reads the arrays of a pickle without running any of it.

A pickle is a program: it names functions and classes, which an ordinary unpickler imports and calls. This one imports
nothing and calls nothing. What the pickle names becomes a `Global`, what it would make by a call a `Made`, which hold
names and arguments; of these `array` builds what it knows to be a NumPy array, from numbers alone. So the optimizer,
closures and code in an M3AE checkpoint are read over, and those in a hostile file too.
"""

from __future__ import annotations

import dataclasses
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import ml_dtypes
import numpy as np

from m3ae_jax.convert.formats import reading
from m3ae_jax.errors import UserError

_JAX_ARRAY = {
    "jax._src.array._reconstruct_array",
    # jax 0.3, of the M3AE release's time, and before
    "jax._src.device_array.reconstruct_device_array",
    "jax.interpreters.xla.reconstruct_device_array",
}
_KINDS = "biufc"  # of dtypes: numbers; never objects
_MOST_IN_A_KEY = 1_000  # parts of parts: of a few bytes a pickle can make a tuple whose hash takes for ever


@dataclasses.dataclass(frozen=True)
class Global:
    """What a pickle calls by a name.

    Attributes:
        name: dotted, ``module.name``.
    """

    name: str


class Made:
    """What a pickle would make by calling something.

    Attributes:
        function: what it would call, a `Global` in most cases.
        arguments: with which.
        state: what it would then set, None if nothing.
        items: what it would append, add or set by a key.
    """

    def __init__(self, function: Any, arguments: Any) -> None:
        self.function, self.arguments = function, arguments
        self.state: Any = None
        self.items: list[Any] = []
        # What the unpickler does to a list and a set; below, to a dict.
        self.extend, self.append, self.add = self.items.extend, self.items.append, self.items.append

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    @property
    def name(self) -> str:
        """The dotted name of what it calls; "" if that has none."""
        return self.function.name if isinstance(self.function, Global) else ""


_KEYS = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(None, None, 2),
    pickle.DICT: slice(None, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}
"""Where on the stack, since its mark, the opcodes that make keys have them."""


def _checked(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    """An opcode that first refuses keys of too many parts."""

    def check_and_load(self: Any) -> None:
        if any(self.parts(key) > _MOST_IN_A_KEY for key in self.stack[keys]):
            raise pickle.UnpicklingError(f"a key of more than {_MOST_IN_A_KEY} parts")
        load(self)

    return check_and_load


class _Inert(pickle._Unpickler):
    """Python's own unpickler, written in Python, in which every opcode that imports or calls is replaced."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    # Of the base class, for the type checker.
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        # Of each tuple how many parts it has, with the tuple, so that no other gets its id.
        self._parts: dict[int, tuple[int, tuple[Any, ...]]] = {}

    def _tuple(self, items: list[Any]) -> None:
        made = tuple(items)
        if made:
            self._parts[id(made)] = min(len(made) + sum(map(self.parts, made)), 2 * _MOST_IN_A_KEY), made
        self.append(made)

    def parts(self, value: Any) -> int:
        """Of a tuple, with those of the tuples in it; 0 of all else."""
        return self._parts[id(value)][0] if id(value) in self._parts else 0

    def load_tuple(self) -> None:
        self._tuple(self.pop_mark())

    def load_tuple1(self) -> None:
        self._tuple([self.stack.pop()])

    def load_tuple2(self) -> None:
        self._tuple([self.stack.pop(-2), self.stack.pop()])

    def load_tuple3(self) -> None:
        self._tuple([self.stack.pop(-3), self.stack.pop(-2), self.stack.pop()])

    def find_class(self, module: str, name: str) -> Global:
        return Global(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Made:
        return Made(Global("persistent_load"), (pid,))

    def get_extension(self, code: int) -> None:
        self.append(Global(f"extension.{code}"))

    def _instantiate(self, function: Any, arguments: Any) -> None:
        self.append(Made(function, tuple(arguments)))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = Made(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        keywords = self.stack.pop()
        arguments = self.stack.pop()
        self.stack[-1] = Made(self.stack[-1], (arguments, keywords))

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Made):
            self.stack[-1].state = state

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))  # Python's makes it first, however long, and then reads

    def refuse_buffer(self) -> None:
        raise pickle.UnpicklingError("its arrays are in other files")

    dispatch[pickle.TUPLE[0]] = load_tuple
    dispatch[pickle.TUPLE1[0]] = load_tuple1
    dispatch[pickle.TUPLE2[0]] = load_tuple2
    dispatch[pickle.TUPLE3[0]] = load_tuple3
    for opcode, keys in _KEYS.items():
        dispatch[opcode[0]] = _checked(dispatch[opcode[0]], keys)
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.NEXT_BUFFER[0]] = refuse_buffer
    dispatch[pickle.READONLY_BUFFER[0]] = refuse_buffer

    if set(dispatch) != set(pickle._Unpickler.dispatch):
        raise AssertionError("an opcode has no name in this Python")


class _Bounded:
    """A file of which no more can be read than it holds: a length in a pickle is the writer's word."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, length: int) -> bytes:
        if length > self._size:
            raise EOFError("a length beyond the file's end")
        return self._file.read(length)


def load(path: Path) -> Any:
    """The content of a pickle: plain lists, dicts, numbers and texts, and `Global` and `Made` for all else.

    Raises:
        UserError: it cannot be read, or is no pickle.
    """
    with reading(path, "pickle"), path.open("rb") as file:
        return read(file, path.stat().st_size)


def read(file: BinaryIO, size: int) -> Any:
    """As `load`, of an open file of `size` bytes; raises whatever damage makes it raise."""
    return _Inert(_Bounded(file, size)).load()


def array(node: Any) -> np.ndarray | None:
    """The array that a node of `load`'s stands for; None if it stands for anything else.

    Raises:
        UserError: it is an array of objects, or its parts do not fit each other.
    """
    if not isinstance(node, Made):
        return None
    try:
        return _array(node)
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:
        raise UserError(f"an array in the pickle is not of numbers, or damaged: {error}") from None


def _array(node: Made) -> np.ndarray | None:
    name = node.name.replace("numpy.core.", "numpy._core.")  # the first until NumPy 2
    if name in _JAX_ARRAY:
        rebuild, arguments, state = node.arguments[:3]
        inner = Made(rebuild, arguments)
        inner.state = state
        return _array(inner)
    if name == "numpy._core.multiarray._reconstruct":
        _, shape, dtype, fortran, raw = node.state
        return _from_bytes(raw, dtype, shape, "F" if fortran else "C")
    if name == "numpy._core.numeric._frombuffer":
        raw, dtype, shape, order, *axes = node.arguments
        if order == "K":
            return np.transpose(_from_bytes(raw, dtype, shape, "C"), axes[0])
        return _from_bytes(raw, dtype, shape, order)
    if name == "numpy._core.multiarray.scalar":
        dtype, raw = node.arguments
        return _from_bytes(raw, dtype, (), "C")
    return None


def _from_bytes(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if isinstance(raw, Made):  # in protocols that know no bytes
        raw = {"_codecs.encode": raw.arguments[:1], "__builtin__.bytes": [b""]}.get(raw.name, [None])[0]
    if isinstance(raw, str):
        raw = raw.encode("latin1")
    if not isinstance(raw, (bytes, bytearray)):
        raise ValueError("its data are not bytes")
    return np.frombuffer(bytes(raw), _dtype(dtype)).reshape(tuple(int(n) for n in shape), order=order)


def _dtype(node: Any) -> np.dtype:
    if not isinstance(node, Made) or node.name != "numpy.dtype":
        raise ValueError("it has no dtype")
    code = node.arguments[0]
    if isinstance(code, Global) and code.name == "ml_dtypes.bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    if isinstance(code, bytes):
        code = code.decode("ascii")
    if not isinstance(code, str):
        raise ValueError("its dtype has no name")
    if code[:1] not in _KINDS or (dtype := np.dtype(code)).kind not in _KINDS:
        raise ValueError(f"its dtype {code!r} is not of numbers")
    order: Any = node.state[1] if node.state else "="
    return dtype.newbyteorder(order) if order in ("<", ">") else dtype


def fields(node: Any) -> Mapping[str, Any] | None:
    """What a node holds by name: a dict, or the dict in which a class instance has its fields; None if neither."""
    if isinstance(node, dict):
        return node
    if not isinstance(node, Made):
        return None
    if node.items and all(isinstance(i, tuple) and len(i) == 2 and isinstance(i[0], str | int) for i in node.items):
        return dict(node.items)  # an OrderedDict, which may have a state besides
    state = node.state[-1] if isinstance(node.state, tuple) and node.state else node.state
    if isinstance(state, dict) and state:
        inner = state.get("_dict")  # the one field of flax's FrozenDict
        return inner if isinstance(inner, dict) else state
    for argument in node.arguments if isinstance(node.arguments, tuple) else ():
        if isinstance(argument, dict):
            return argument
    return None


def plain(node: Any) -> dict[str, Any]:
    """The numbers and texts that a node holds by name; nothing where it holds none."""
    simple = str | int | float | None
    return {name(key): value for key, value in (fields(node) or {}).items() if isinstance(value, simple)}


_MOST_NODES = 1_000_000


def name(key: Any) -> str:
    """A key as a part of a path."""
    return key if isinstance(key, str) else f"{key:d}" if isinstance(key, int) and abs(key) < 10**18 else "?"


def arrays(node: Any) -> dict[str, np.ndarray]:
    """All arrays in nested dicts, by path with slashes; what is no array is left out.

    Raises:
        UserError: too many, or nested too deep: a small pickle can name the same dict again and again.
    """
    result: dict[str, np.ndarray] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [((), node)]
    for _ in range(_MOST_NODES):
        if not waiting:
            return result
        path, node = waiting.pop()
        leaf = None if isinstance(node, dict) else array(node)
        if leaf is not None:
            result["/".join(path)] = leaf
        elif len(path) < 20:
            waiting.extend(((*path, name(key)), value) for key, value in (fields(node) or {}).items())
    raise UserError(f"the pickle has more than {_MOST_NODES} entries")
