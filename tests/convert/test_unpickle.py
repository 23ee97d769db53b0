"""Arrays come out of every kind of pickle; nothing in one is ever run."""

import collections
import copyreg
import io
import os
import pickle
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from m3ae_jax.convert import unpickle
from m3ae_jax.errors import UserError

ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "permuted": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "swapped bytes": np.arange(4, dtype=">f4"),
    "half": np.arange(4, dtype=np.float16),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "no axis": np.array(3.5),
    "scalar": np.float32(2.5),
    "bfloat16": np.arange(4).astype(ml_dtypes.bfloat16),
    "jax": jnp.arange(4, dtype=jnp.float32) / 3,
}


def read(data: bytes) -> Any:
    return unpickle.read(io.BytesIO(data), len(data))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_protocol(name: str, protocol: int) -> None:
    value = ARRAYS[name]
    arrays = unpickle.arrays(read(pickle.dumps({"params": {"x": value}}, protocol)))
    assert list(arrays) == ["params/x"]
    got, want = arrays["params/x"], np.asarray(value)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert np.array_equal(got, want)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_names_that_numpy_1_gave(protocol: int) -> None:
    data = pickle.dumps({"x": ARRAYS["float32"]}, protocol)
    for new, old in (
        (b"numpy._core.multiarray", b"numpy.core.multiarray"),
        (b"numpy._core.numeric", b"numpy.core.numeric"),
    ):
        # One letter less: the length before the name, where there is one, and that of the frame.
        if protocol == 2:
            data = data.replace(new, old)
        else:
            data = data.replace(bytes([len(new)]) + new, bytes([len(old)]) + old)
    data = data if protocol == 2 else data[:2] + data[11:]  # without the frame
    assert b"numpy.core" in data and b"_core" not in data
    assert np.array_equal(unpickle.arrays(read(data))["x"], ARRAYS["float32"])


class Runs:
    """Pickled, it is a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def hostile(proof: Path) -> dict[str, bytes]:
    command = f"touch {proof}"
    return {
        "reduce": pickle.dumps(Runs(os.system, command)),
        "reduce, protocol 0": pickle.dumps(Runs(os.system, command), 0),
        "eval": pickle.dumps(Runs(eval, f"open({str(proof)!r}, 'w')")),
        "inst": f"(S'{command}'\nios\nsystem\n.".encode(),
        "obj": f"(cos\nsystem\nS'{command}'\no.".encode(),
        "newobj": b"\x80\x02cos\nsystem\nX" + len(command).to_bytes(4, "little") + command.encode() + b"\x85\x81.",
        "as the data of an array": pickle.dumps(
            {"x": Runs(np._core.multiarray._reconstruct, np.ndarray, (0,), Runs(os.system, command))}
        ),
        "as the type of an array": pickle.dumps(Runs(np.ndarray, (1,), Runs(os.system, command))),
        "build": b"\x80\x02cbuiltins\nobject\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsbX"
        + len(command).to_bytes(4, "little")
        + command.encode()
        + b"b.",
        "append": b"\x80\x02cos\nsystem\n]X\x04\x00\x00\x00\x61\x61\x61\x61ae.",
        "jax's way": pickle.dumps(Runs(jnp.zeros(1).__reduce__()[0], os.system, (command,), (), {})),
    }


@pytest.mark.parametrize("name", sorted(hostile(Path("x"))))
def test_a_hostile_pickle_runs_nothing(name: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    data = hostile(proof)[name]
    file = tmp_path / "model.pkl"
    file.write_bytes(data)
    try:
        root = unpickle.load(file)
        unpickle.arrays({"params": root} if not isinstance(root, dict) else root)
    except UserError:
        pass
    assert not proof.exists()
    if name.startswith("reduce"):  # the same bytes would have
        pickle.loads(data)
        assert proof.exists()


def test_an_extension_code_names_nothing() -> None:
    copyreg.add_extension("os", "system", 240)
    try:
        assert isinstance(read(b"\x80\x02\x82\xf0."), unpickle.Global)
    finally:
        copyreg.remove_extension("os", "system", 240)


def test_a_class_instance_is_its_fields() -> None:
    class_ = "M3AETrainState"
    body = pickle.dumps({"step": 3, "params": {"params": {"w": ARRAYS["float32"]}}}, 2)[2:-1]
    data = b"\x80\x02cm3ae.model\n" + class_.encode() + b"\n)\x81" + body + b"b."
    node = read(data)
    assert node.name == "m3ae.model.M3AETrainState"
    assert unpickle.fields(node)["step"] == 3
    assert list(unpickle.arrays(unpickle.fields(node)["params"])) == ["params/w"]


def test_dicts_of_other_classes() -> None:
    ordered = collections.OrderedDict(x=ARRAYS["float32"])
    assert list(unpickle.arrays(read(pickle.dumps({"p": ordered})))) == ["p/x"]
    frozen = pytest.importorskip("flax.core").freeze({"p": {"x": ARRAYS["float32"]}})
    assert list(unpickle.arrays(read(pickle.dumps(frozen)))) == ["p/x"]


def test_what_is_no_number_is_refused_or_left_out() -> None:
    objects = np.array([{"a": 1}, None], dtype=object)
    with pytest.raises(UserError, match="not of numbers"):
        unpickle.arrays(read(pickle.dumps({"x": objects})))
    assert unpickle.arrays(read(pickle.dumps({"x": "text", "y": [1, 2], "z": None}))) == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        pickle.dumps(ARRAYS["float32"])[:-20],
        b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b".",  # a bytearray of 4 exabytes
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".",
        b"\x80\x05\x97.",  # a buffer from outside
        b"\x80\x02(((((.",
        b"\x80\x02]\x94h\x00a",
    ],
)
def test_damage_is_one_line(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.pkl"
    file.write_bytes(data)
    with pytest.raises(UserError, match="is not a whole pickle") as error:
        unpickle.load(file)
    assert "\n" not in str(error.value)


def test_a_dict_named_again_and_again_is_refused() -> None:
    inner: dict[str, Any] = {}
    for _ in range(15):
        inner = {str(i): inner for i in range(10)}
    with pytest.raises(UserError, match="more than 1000000 entries"):
        unpickle.arrays(read(pickle.dumps(inner)))
    ring: dict[str, Any] = {}
    ring["again"] = ring
    assert unpickle.arrays(read(pickle.dumps(ring))) == {}
