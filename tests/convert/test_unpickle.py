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
from m3ae_jax.convert.convert import import_weights
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


def nested(depth: int) -> bytes:
    """Opcodes that leave a tuple on the stack which holds itself two to the power of `depth` times."""
    return b"K\x01q\x00" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(depth))


@pytest.mark.parametrize(
    "use", [b"}h(K\x01s", b"}(h(K\x01u", b"(h(K\x01d", b"\x8f(h(\x90", b"(h(\x91", b"}}h(K\x01sh(s", b"0}h(h(s"]
)
def test_item_6_a_key_whose_hash_takes_for_ever_is_one_line(use: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.pkl"
    file.write_bytes(b"\x80\x04" + nested(40) + use + b".")  # "(" is 40
    with pytest.raises(UserError, match=r"is not a whole pickle: .*more than 1000 parts") as error:
        unpickle.load(file)
    assert "\n" not in str(error.value)


def test_item_6_no_name_is_made_of_what_takes_for_ever() -> None:
    array = pickle.dumps({"x": np.arange(3, dtype=np.float32)}, 2)
    assert b"X\x02\x00\x00\x00f4" in array
    with pytest.raises(UserError, match="its dtype has no name"):
        unpickle.arrays(read(b"\x80\x02" + nested(40) + b"0" + array[2:].replace(b"X\x02\x00\x00\x00f4", b"h(")))
    assert unpickle.plain(read(b"\x80\x02" + nested(40) + b"0}X\x01\x00\x00\x00ah(sX\x01\x00\x00\x00bK\x05s.")) == {
        "b": 5
    }
    assert list(unpickle.arrays({10**5000: {"x": unpickle.read(io.BytesIO(array), len(array))["x"]}})) == ["?/x"]
    small = {("a", 1): 2, frozenset("b"): 3}
    assert read(pickle.dumps(small)) == small


@pytest.mark.parametrize("content", [b"", b"no zip", pickle.dumps({"a": 1}), b"PK\x03\x04cut", b"\x93NUMPY\x01\x00"])
def test_item_6_an_npz_that_is_no_zip_is_one_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "weights.npz"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"is not a whole \.npz: ValueError: it is no zip file") as error:
        import_weights(file)
    assert "\n" not in str(error.value) and "allow_pickle" not in str(error.value)


def test_item_6_shapes_that_no_model_has_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "weights.npz"
    np.savez(file, **{"cls_token": np.zeros(3), "encoder/Block_0/TransformerMLP_0/fc1/kernel": np.zeros(3)})
    with pytest.raises(UserError, match="is not a whole model of format m3ae") as error:
        import_weights(file)
    assert "\n" not in str(error.value)
