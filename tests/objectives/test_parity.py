"""Equal numbers with the M3AE reference (young-geng/m3ae_public a5eb14f) at its own parameters, inputs and masks.

Every array is within 1e-4 of the reference's norm. The layouts differ: `OURS` says how. The reference draws one mask
for the batch and leaves its padding in the sequences, where no real token sees it; here the padded slots are not valid.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from m3ae_jax import config as configs
from m3ae_jax.data.images import patchify
from m3ae_jax.models.encoder import Encoded
from m3ae_jax.models.transformer import Tap
from m3ae_jax.objectives.base import LossOutput, Part
from m3ae_jax.objectives.batch import mean, total_loss
from m3ae_jax.objectives.m3ae import M3AE
from m3ae_jax.train.optimizer import decay_mask, optimizer, schedule

TOLERANCE = 1e-4
M3AE_VARIANTS = ("m3ae", "m3ae_head", "m3ae_notype")
VARIANTS = (*M3AE_VARIANTS, "mae", "mae_notype")

# (pattern of the reference's path, our path). {layer} is an index into the leading axis of our stacked layers. What is
# left is a reshape: a kernel (D, 3 D) is (D, 3, H, D/H) here, one of (D, D) is (H, D/H, D).
_BLOCK = r"(?P<stack>encoder|decoder)/Block_(?P<layer>\d+)"
_HEAD = r"decoder_(?P<modality>image|text)_output"
OURS: tuple[tuple[str, str], ...] = (
    (rf"{_BLOCK}/LayerNorm_0/(?P<leaf>\w+)", "{stack}/transformer/blocks/norm_attention/{leaf}"),
    (rf"{_BLOCK}/Attention_0/Dense_0/(?P<leaf>\w+)", "{stack}/transformer/blocks/attention/qkv/{leaf}"),
    (rf"{_BLOCK}/Attention_0/Dense_1/(?P<leaf>\w+)", "{stack}/transformer/blocks/attention/out/{leaf}"),
    (rf"{_BLOCK}/LayerNorm_1/(?P<leaf>\w+)", "{stack}/transformer/blocks/norm_mlp/{leaf}"),
    (rf"{_BLOCK}/TransformerMLP_0/fc1/(?P<leaf>\w+)", "{stack}/transformer/blocks/mlp_in/{leaf}"),
    (rf"{_BLOCK}/TransformerMLP_0/fc2/(?P<leaf>\w+)", "{stack}/transformer/blocks/mlp_out/{leaf}"),
    (r"(?P<stack>encoder|decoder)/LayerNorm_0/(?P<leaf>\w+)", "{stack}/transformer/norm/{leaf}"),
    (rf"{_HEAD}/LayerNorm_(?P<n>\d+)/(?P<leaf>\w+)", "decoder/{modality}_output/norm_{n}/{leaf}"),
    (r"decoder_input_projection/(?P<leaf>\w+)", "decoder/projection/{leaf}"),
    (r"image_embedding/(?P<leaf>\w+)", "encoder/image/embedding/{leaf}"),
    (r"text_embedding/embedding", "encoder/text/embedding/embedding"),
    (r"encoder_(?P<modality>image|text)_type_embedding", "encoder/{modality}/type_embedding"),
    (r"decoder_(?P<modality>image|text)_type_embedding", "decoder/{modality}_masks/type_embedding"),
    (r"(?P<modality>image|text)_mask_embedding", "decoder/{modality}_masks/mask_embedding"),
    (r"cls_token", "encoder/cls_token"),
)
# The last Dense_n of a head is our `output`, those before it are our hidden layers.
HEAD_DENSE = {
    0: ((rf"{_HEAD}/Dense_0/(?P<leaf>\w+)", "decoder/{modality}_output/output/{leaf}"),),
    1: (
        (rf"{_HEAD}/Dense_0/(?P<leaf>\w+)", "decoder/{modality}_output/hidden_0/{leaf}"),
        (rf"{_HEAD}/Dense_1/(?P<leaf>\w+)", "decoder/{modality}_output/output/{leaf}"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf of the reference is in our tree: a path, and the layer if it is stacked."""

    path: str
    layer: int | None


def place(key: str, head_depth: int) -> Place:
    """Of a reference key such as ``params/encoder/Block_0/LayerNorm_0/scale``."""
    for pattern, ours in OURS + HEAD_DENSE[head_depth]:
        if match := re.fullmatch(pattern, key.removeprefix("params/")):
            groups = match.groupdict()
            layer = groups.pop("layer", None)
            return Place(ours.format(**groups), None if layer is None else int(layer))
    raise KeyError(key)


class Case:
    """One variant of the reference: what it wrote down, and our objective with its parameters."""

    def __init__(self, folder: Path, variant: str) -> None:
        self.variant = variant
        self.want: Mapping[str, np.ndarray] = dict(np.load(folder / f"{variant}.npz"))
        self.reference_params: Mapping[str, np.ndarray] = dict(np.load(folder / f"{variant}_params.npz"))
        self.sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.head_depth = self.sizes["extra_head_depth"] if variant == "m3ae_head" else 0
        self.config = self._config()
        self.objective = M3AE(self.config, self.sizes["vocab"])
        boxed = jax.eval_shape(self.objective.init, jax.random.key(0))
        self.shapes = {k: v.shape for k, v in flatten_dict(nn.unbox(boxed), sep="/").items()}
        self.params = self.to_ours(self.reference_params)

    def _config(self) -> ConfigDict:
        sizes, c = self.sizes, configs.default()
        theirs = sizes["cfg"]
        c.batch_size = 256  # the learning rate is given for 256
        c.model.update(
            width=theirs["emb_dim"],
            depth=theirs["depth"],
            heads=theirs["num_heads"],
            mlp_ratio=float(theirs["mlp_ratio"]),
        )
        c.m3ae.update(
            decoder_width=theirs["dec_emb_dim"],
            decoder_depth=theirs["dec_depth"],
            decoder_heads=theirs["dec_num_heads"],
            image_mask_ratio=theirs["image_mask_ratio"],
            text_mask_ratio=theirs["text_mask_ratio"],
            output_head_depth=self.head_depth,
            use_type_embedding="notype" not in self.variant,
            text_weight=0.5,
        )
        c.compute.dtype = "float32"
        c.optimizer.update(
            learning_rate=1e-2,
            warmup="2 steps",
            b1=0.9,
            b2=0.95,
            weight_decay=0.05,
            clip_norm=1.0,
            no_decay=("bias", "embedding", "cls_token"),  # the reference decays LayerNorm's scales
        )
        c.data.update(image_size=sizes["image"], patch_size=sizes["patch"], max_text_tokens=sizes["text_len"])
        if self.variant.startswith("mae"):
            c.data.modalities = ("image",)
        return configs.resolve(c)

    def to_ours(self, reference: Mapping[str, np.ndarray]) -> Any:
        """Our tree of the reference's leaves; every leaf of ours must be filled."""
        flat = {path: np.full(shape, np.nan, np.float32) for path, shape in self.shapes.items()}
        for key, value in reference.items():
            at = place(key, self.head_depth)
            target = flat[at.path] if at.layer is None else flat[at.path][at.layer]
            target[...] = value.reshape(target.shape)
        assert not any(np.isnan(leaf).any() for leaf in flat.values())
        return jax.tree.map(jnp.asarray, unflatten_dict(flat, sep="/"))

    def to_reference(self, ours: Any) -> dict[str, np.ndarray]:
        """The inverse of `to_ours`."""
        flat, result = flatten_dict(ours, sep="/"), {}
        for key, like in self.reference_params.items():
            at = place(key, self.head_depth)
            leaf = np.asarray(flat[at.path])
            result[key] = (leaf if at.layer is None else leaf[at.layer]).reshape(like.shape)
        return result

    def values(self, modality: str) -> np.ndarray:
        return self.want["in/image_patches" if modality == "image" else "in/text"]

    def real(self, modality: str) -> np.ndarray:
        """`[B, L] bool`."""
        if modality == "image":
            return np.ones(self.values(modality).shape[:2], bool)
        return self.want["in/text_padding_mask"] == 0

    def token_set(self, modality: str, positions: np.ndarray) -> dict[str, np.ndarray]:
        """The tokens at `[K]` positions; the real ones are valid."""
        value = self.values(modality)[:, positions]
        position = np.broadcast_to(positions.astype(np.int32), value.shape[:2])
        return {"value": value, "position": position, "valid": self.real(modality)[:, positions]}

    def group(self, modality: str, ids_restore: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        """Visible tokens in the reference's order, hidden ones by position."""
        assert (mask == mask[0]).all()
        visible = np.argsort(ids_restore)[: int((mask[0] == 0).sum())]
        target = np.flatnonzero(mask[0] == 1)
        assert not set(visible) & set(target)
        return {"visible": self.token_set(modality, visible), "target": self.token_set(modality, target)}

    def batch(self) -> Part:
        """The main pass."""
        modalities = self.config.data.modalities
        masks = {m: (self.want[f"mask/{m}_ids_restore"], self.want[f"mask/{m}_mask"]) for m in modalities}
        return {"groups": {m: self.group(m, *masks[m]) for m in modalities}}

    def alone(self, modality: str) -> Part:
        """The pass of an M3AE over one modality, with masks of its own."""
        ids, mask = self.want[f"{modality}_only/{modality}_ids_restore"], self.want[f"{modality}_only/{modality}_mask"]
        return {"groups": {modality: self.group(modality, ids, mask)}}

    def whole(self, *modalities: str) -> Part:
        """Nothing hidden."""
        positions = {m: np.arange(self.values(m).shape[1]) for m in modalities}
        return {"groups": {m: {"visible": self.token_set(m, p)} for m, p in positions.items()}}


@functools.cache
def load(folder: Path, variant: str) -> Case:
    return Case(folder, variant)


@pytest.fixture
def case(request: pytest.FixtureRequest, shared: Path) -> Case:
    return load(shared / "parity", request.param)


def variants(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return pytest.mark.parametrize("case", names, indirect=True)


def assert_close(got: Any, want: Any, name: str) -> None:
    """Within `TOLERANCE` of the norm of `want`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, name
    error, norm = np.linalg.norm(got - want), np.linalg.norm(want)
    assert error <= TOLERANCE * norm, f"{name}: off by {error:.3g}, of a norm of {norm:.3g}"


def assert_leaves_close(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], prefix: str) -> None:
    expected = {key.removeprefix(prefix): value for key, value in want.items() if key.startswith(prefix)}
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(got[key], value, prefix + key)


def reference_total(case: Case, output: LossOutput) -> jax.Array:
    """The reference's total: an example without a hidden word counts as 0 in the text loss, not as absent."""
    terms = dict(output.terms)
    if "text_loss" in terms:
        terms["text_loss"] = (terms["text_loss"][0], jnp.float32(case.sizes["B"]))
    return total_loss(terms, case.objective.term_weights)


@dataclasses.dataclass(frozen=True)
class Pass:
    """All forward figures of a batch."""

    encoded: Encoded
    outputs: dict[str, jax.Array]
    loss: LossOutput


@functools.cache
def forward(case: Case, passes: str) -> Pass:
    """Of the ``main`` batch, or of one modality alone; compiled once for all tests."""
    batch = case.batch() if passes == "main" else case.alone(passes)

    @jax.jit
    def run(params: Any) -> tuple[Any, ...]:
        loss = case.objective.loss(params, {}, batch, None, jnp.int32(0))
        return case.objective.encode(params, batch), case.objective.predict(params, batch), loss

    return Pass(*run(case.params))


def reference_accuracy(case: Case, logits: jax.Array, batch: Part) -> np.ndarray:
    """The reference's text accuracy, over all examples as its text loss."""
    target = batch["groups"]["text"]["target"]
    valid = target["valid"]
    hits = (np.argmax(logits, axis=-1) == target["value"]) & valid
    return np.sum(hits.sum(axis=1) / np.maximum(valid.sum(axis=1), 1)) / case.sizes["B"]


def at_targets(reference: np.ndarray, group: Mapping[str, Any]) -> np.ndarray:
    """The reference's outputs at all positions, `[B, L, P]`, at the valid targets: `[real targets, P]`."""
    rows = np.arange(len(reference))[:, None]
    return reference[rows, group["target"]["position"]][group["target"]["valid"]]


def assert_outputs_close(case: Case, outputs: dict[str, jax.Array], batch: Part, prefix: str) -> None:
    assert outputs.keys() == batch["groups"].keys()
    for name, group in batch["groups"].items():
        want = at_targets(case.want[f"{prefix}/{name}_output"], group)
        assert len(want) > 0
        assert_close(outputs[name][group["target"]["valid"]], want, f"{prefix}/{name}_output")


@variants(*VARIANTS)
def test_every_parameter_has_one_counterpart(case: Case) -> None:
    places = [place(key, case.head_depth) for key in case.reference_params]
    assert len(set(places)) == len(places)
    assert {p.path for p in places} == set(case.shapes)
    assert sum(v.size for v in case.reference_params.values()) == sum(np.prod(s) for s in case.shapes.values())


@variants(*VARIANTS)
def test_patches(case: Case) -> None:
    assert np.array_equal(patchify(case.want["in/image"], case.sizes["patch"]), case.want["in/image_patches"])


@variants(*VARIANTS)
def test_encoder_on_visible_tokens(case: Case) -> None:
    encoded = forward(case, "main").encoded
    if "enc/x" in case.want:
        assert_close(all_tokens(encoded), case.want["enc/x"], "enc/x")
        return
    assert_close(encoded.pooled["cls"][:, None], case.want["enc/cls"], "enc/cls")
    for name, group in case.batch()["groups"].items():
        valid = group["visible"]["valid"]
        assert_close(encoded.tokens[name][valid], case.want[f"enc/{name}"][valid], f"enc/{name}")


@variants(*VARIANTS)
def test_outputs_at_hidden_tokens(case: Case) -> None:
    assert_outputs_close(case, forward(case, "main").outputs, case.batch(), "out")


@pytest.mark.slow
@variants(*VARIANTS)
def test_losses_and_gradients(case: Case) -> None:
    batch = case.batch()

    def loss(params: Any) -> tuple[jax.Array, LossOutput]:
        output = case.objective.loss(params, {}, batch, None, jnp.int32(0))
        return reference_total(case, output), output

    (total, output), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params)
    prefix = "loss/masked/" if case.variant in M3AE_VARIANTS else "loss/"
    got = {"image": mean(*output.terms["image_loss"]), "grad_global_norm": optax.global_norm(gradient)}
    if case.variant in M3AE_VARIANTS:
        got["total"] = total
        got["text"] = output.terms["text_loss"][0] / case.sizes["B"]
    for name, value in got.items():
        assert_close(value, case.want[prefix + name], prefix + name)
    assert_leaves_close(case.to_reference(gradient), case.want, "grad/")


@variants(*M3AE_VARIANTS)
def test_text_accuracy(case: Case) -> None:
    accuracy = reference_accuracy(case, forward(case, "main").outputs["text"], case.batch())
    assert_close(accuracy, case.want["loss/masked/text_accuracy"], "loss/masked/text_accuracy")


@variants(*M3AE_VARIANTS)
@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_alone(case: Case, modality: str) -> None:
    batch, got = case.alone(modality), forward(case, modality)
    assert_outputs_close(case, got.outputs, batch, f"{modality}_only")
    assert got.loss.terms.keys() == {f"{modality}_loss"}
    total, weight = got.loss.terms[f"{modality}_loss"]
    weight = case.sizes["B"] if modality == "text" else weight
    assert_close(total / weight, case.want[f"{modality}_only/loss"], f"{modality}_only/loss")
    if modality == "text":
        accuracy = reference_accuracy(case, got.outputs["text"], batch)
        assert_close(accuracy, case.want["text_only/accuracy"], "text_only/accuracy")


PLAIN = [(v, name) for v in M3AE_VARIANTS for name in ("both", "image_only", "text_only")]
PLAIN += [("mae", "image"), ("mae_notype", "image")]


@pytest.mark.parametrize(("case", "name"), PLAIN, indirect=["case"])
def test_plain_encoder(case: Case, name: str) -> None:
    modalities = ("image", "text") if name == "both" else (name.removesuffix("_only"),)
    batch, real = case.whole(*modalities), real_tokens(case, modalities)
    if name == "both":
        encoded, maps = encode_with_maps(case, batch)
        assert len(maps) == case.sizes["cfg"]["depth"]
        for layer, weights in enumerate(maps):
            # A query's row; what padding asks for is nobody's business.
            got, want = (np.swapaxes(x, 1, 2)[real] for x in (weights, case.want[f"rep/attention/Block_{layer}"]))
            assert_close(got, want, f"rep/attention/Block_{layer}")
    else:
        encoded = jax.jit(case.objective.encode)(case.params, batch)
    assert_close(all_tokens(encoded)[real], case.want[f"rep/{name}"][real], f"rep/{name}")


def all_tokens(encoded: Encoded) -> jax.Array:
    """`[B, 1 + tokens, D]`, CLS first."""
    return jnp.concatenate([encoded.pooled["cls"][:, None], *encoded.tokens.values()], axis=1)


def encode_with_maps(case: Case, batch: Part) -> tuple[Encoded, jax.Array]:
    """The features as `Objective.encode` gives them, and the attention maps `[layers, B, H, N, N]`."""
    visible = {name: group["visible"] for name, group in batch["groups"].items()}

    @functools.partial(jax.jit, static_argnums=1)
    def run(params: Any, layer: int) -> Encoded:
        encoded: Encoded = case.objective._encoder.apply({"params": params["encoder"]}, visible, tap=Tap(layer))
        return encoded

    of_layers = [run(case.params, layer) for layer in range(case.sizes["cfg"]["depth"])]
    return of_layers[0], jnp.stack([encoded.attention for encoded in of_layers])


def real_tokens(case: Case, modalities: tuple[str, ...]) -> np.ndarray:
    """`[B, 1 + tokens] bool`, with CLS."""
    return np.concatenate([np.ones((case.sizes["B"], 1), bool), *(case.real(m) for m in modalities)], axis=1)


@variants(*M3AE_VARIANTS)
def test_decay_mask(case: Case) -> None:
    ours = flatten_dict(decay_mask(case.params, case.config.optimizer.no_decay), sep="/")
    theirs = json.loads(str(case.want["opt/decay_mask_json"]))
    assert {key: ours[place(key, case.head_depth).path] for key in theirs} == theirs
    assert theirs.keys() == case.reference_params.keys()


@variants(*M3AE_VARIANTS)
def test_schedule(case: Case) -> None:
    learning_rate = schedule(case.config, total_steps=10, examples=1)
    got = np.array([learning_rate(step) for step in range(11)])
    assert_close(got, case.want["opt/schedule_0_to_10"], "opt/schedule_0_to_10")


@variants(*M3AE_VARIANTS)
def test_three_updates(case: Case) -> None:
    tx = optimizer(case.config, schedule(case.config, total_steps=10, examples=1))
    grads = case.to_ours({k.removeprefix("grad/"): v for k, v in case.want.items() if k.startswith("grad/")})

    @jax.jit
    def update(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = case.params, tx.init(case.params)
    for _ in range(3):
        params, state = update(params, state)
    after = case.to_reference(params)
    assert_leaves_close(after, case.want, "opt/params_after_3/")
    for key, before in case.reference_params.items():  # the change alone: what decay and rate make is small beside it
        assert_close(after[key] - before, case.want[f"opt/params_after_3/{key}"] - before, f"change of {key}")
