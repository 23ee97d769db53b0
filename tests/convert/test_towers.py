"""CLIP, SigLIP and BERT of PyTorch's own layers, with random weights: the same numbers there and here, both ways."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import m3ae_jax.inference as inference
from m3ae_jax.convert import check, convert, safetensors
from m3ae_jax.data.images import patchify
from m3ae_jax.errors import UserError
from m3ae_jax.objectives.base import build

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch")

WIDTH, DEPTH, HEADS, PATCH, SIDE, JOINT, TEXT, WORDS = 32, 2, 4, 8, 3, 24, 48, 40
LENGTHS = (1, 5, 7)
EPSILON = {"clip": 1e-5, "siglip": 1e-6}


def quick_gelu(x: Any) -> Any:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "quick_gelu": quick_gelu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def stack(width: int, activation: str, epsilon: float, *, first: bool = True) -> Any:
    layers = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(
            width, HEADS, 4 * width, 0.0, ACTIVATIONS[activation], epsilon, batch_first=True, norm_first=first
        ),
        DEPTH,
        enable_nested_tensor=False,
    )
    return drawn(layers).eval()


def drawn(module: Any) -> Any:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (p.ndim == 1) * 0.5)
    return module.double()


def tensor(*shape: int) -> Any:
    return torch.randn(*shape, dtype=torch.float64) * 0.3


class Towers:
    """Both, of one kind; what they compute follows the papers, by PyTorch's layers."""

    def __init__(self, kind: str, activation: str) -> None:
        torch.manual_seed(0)
        self.kind, epsilon = kind, EPSILON[kind]
        siglip = kind == "siglip"
        self.joint = WIDTH if siglip else JOINT
        self.image, self.text = stack(WIDTH, activation, epsilon), stack(TEXT, activation, epsilon)
        self.conv = drawn(torch.nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=siglip))
        self.norm0 = drawn(torch.nn.LayerNorm(WIDTH, epsilon))
        self.norm, self.text_norm = (drawn(torch.nn.LayerNorm(w, epsilon)) for w in (WIDTH, TEXT))
        self.class_token, self.places = tensor(WIDTH), tensor(SIDE**2 + (not siglip), WIDTH)
        self.rows = 12
        self.words, self.text_places = tensor(WORDS, TEXT), tensor(self.rows, TEXT)
        self.projection = drawn(torch.nn.Linear(WIDTH, self.joint, bias=False))
        self.text_projection = drawn(torch.nn.Linear(TEXT, self.joint, bias=siglip))
        self.query = tensor(1, 1, WIDTH)
        self.pool = drawn(torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
        self.pool_norm = drawn(torch.nn.LayerNorm(WIDTH, epsilon))
        self.fc1, self.fc2 = (drawn(torch.nn.Linear(a, b)) for a, b in ((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)))
        self.activation = ACTIVATIONS[activation]

    def pictures(self, pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            x = self.conv(torch.from_numpy(pixels).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
            if self.kind == "siglip":
                x = self.norm(self.image(x + self.places))
                pooled = self.pool(self.query.expand(len(x), 1, -1), x, x)[0]
                pooled = (pooled + self.fc2(self.activation(self.fc1(self.pool_norm(pooled)))))[:, 0]
            else:
                x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1) + self.places
                pooled = self.projection(self.norm(self.image(self.norm0(x))[:, 0]))
            return torch.nn.functional.normalize(pooled).numpy()

    def captions(self, texts: list[np.ndarray]) -> np.ndarray:
        out = []
        with torch.no_grad():
            for ids in texts:
                if self.kind == "siglip":
                    whole = [*ids, *[1] * (self.rows - len(ids))]
                    x = self.text(self.words[whole][None] + self.text_places)
                else:  # what is padded after the end is seen by nothing before it
                    whole = [WORDS - 2, *ids, WORDS - 1, 0, 0]
                    mask = torch.nn.Transformer.generate_square_subsequent_mask(len(whole), dtype=torch.float64)
                    x = self.text(self.words[whole][None] + self.text_places[: len(whole)], mask, is_causal=True)
                    x = x[:, : len(ids) + 2]
                out.append(self.text_projection(self.text_norm(x[:, -1])))
            return torch.nn.functional.normalize(torch.cat(out)).numpy()

    # --- the spellings

    def arrays(self, spelling: str) -> dict[str, np.ndarray]:
        return {name: np.asarray(x.detach(), np.float32) for name, x in getattr(self, spelling)().items()}

    def _layer(self, at: str, layer: Any, names: tuple[str, ...], *, three: tuple[str, ...] = ()) -> dict[str, Any]:
        out = {}
        for name, part in zip(
            names, (layer.norm1, layer.norm2, layer.self_attn.out_proj, layer.linear1, layer.linear2), strict=True
        ):
            out |= {f"{at}.{name}.{end}": getattr(part, end) for end in ("weight", "bias")}
        for end in ("weight", "bias"):
            whole = getattr(layer.self_attn, f"in_proj_{end}")
            if len(three) > 1:
                out |= {f"{at}.{n}.{end}": x for n, x in zip(three, whole.chunk(3), strict=True)}
            else:
                out[f"{at}.{three[0]}{end}"] = whole
        return out

    def transformers(self) -> dict[str, Any]:
        names = ("layer_norm1", "layer_norm2", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
        three = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        out: dict[str, Any] = {}
        for tower, layers in (("vision_model", self.image), ("text_model", self.text)):
            for n, layer in enumerate(layers.layers):
                out |= self._layer(f"{tower}.encoder.layers.{n}", layer, names, three=three)
        out |= {
            "vision_model.embeddings.patch_embedding.weight": self.conv.weight,
            "vision_model.embeddings.position_embedding.weight": self.places,
            "vision_model.post_layernorm.weight": self.norm.weight,
            "vision_model.post_layernorm.bias": self.norm.bias,
            "text_model.embeddings.token_embedding.weight": self.words,
            "text_model.embeddings.position_embedding.weight": self.text_places,
            "text_model.final_layer_norm.weight": self.text_norm.weight,
            "text_model.final_layer_norm.bias": self.text_norm.bias,
            "text_model.embeddings.position_ids": torch.arange(self.rows)[None],
        }
        if self.kind == "clip":
            return out | {
                "vision_model.embeddings.class_embedding": self.class_token,
                "vision_model.pre_layrnorm.weight": self.norm0.weight,
                "vision_model.pre_layrnorm.bias": self.norm0.bias,
                "visual_projection.weight": self.projection.weight,
                "text_projection.weight": self.text_projection.weight,
                "logit_scale": torch.tensor(3.0),
            }
        return out | {
            "vision_model.embeddings.patch_embedding.bias": self.conv.bias,
            "vision_model.head.probe": self.query,
            **{f"vision_model.head.attention.{n}": p for n, p in self.pool.named_parameters()},
            **{f"vision_model.head.layernorm.{n}": p for n, p in self.pool_norm.named_parameters()},
            **{f"vision_model.head.mlp.fc1.{n}": p for n, p in self.fc1.named_parameters()},
            **{f"vision_model.head.mlp.fc2.{n}": p for n, p in self.fc2.named_parameters()},
            **{f"text_model.head.{n}": p for n, p in self.text_projection.named_parameters()},
            "logit_scale": torch.tensor([2.0]),
            "logit_bias": torch.tensor([-9.0]),
        }

    def open_clip(self) -> dict[str, Any]:
        own = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
        timm = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
        siglip = self.kind == "siglip"
        out: dict[str, Any] = {"logit_scale": torch.tensor(3.0)}
        text = "text." if siglip else ""
        for n, layer in enumerate(self.text.layers):
            out |= self._layer(f"{text}transformer.resblocks.{n}", layer, own, three=("attn.in_proj_",))
        for n, layer in enumerate(self.image.layers):
            if siglip:
                out |= self._layer(f"visual.trunk.blocks.{n}", layer, timm, three=("attn.qkv.",))
            else:
                out |= self._layer(f"visual.transformer.resblocks.{n}", layer, own, three=("attn.in_proj_",))
        out |= {
            f"{text}token_embedding.weight": self.words,
            f"{text}positional_embedding": self.text_places,
            **{f"{text}ln_final.{n}": p for n, p in self.text_norm.named_parameters()},
        }
        if not siglip:
            return out | {
                "visual.conv1.weight": self.conv.weight,
                "visual.class_embedding": self.class_token,
                "visual.positional_embedding": self.places,
                **{f"visual.ln_pre.{n}": p for n, p in self.norm0.named_parameters()},
                **{f"visual.ln_post.{n}": p for n, p in self.norm.named_parameters()},
                "visual.proj": self.projection.weight.T,
                "text_projection": self.text_projection.weight.T,
                "attn_mask": torch.zeros(self.rows, self.rows),
            }
        weights, biases = self.pool.in_proj_weight, self.pool.in_proj_bias
        return out | {
            **{f"visual.trunk.patch_embed.proj.{n}": p for n, p in self.conv.named_parameters()},
            "visual.trunk.pos_embed": self.places[None],
            **{f"visual.trunk.norm.{n}": p for n, p in self.norm.named_parameters()},
            "visual.trunk.attn_pool.latent": self.query,
            "visual.trunk.attn_pool.q.weight": weights[:WIDTH],
            "visual.trunk.attn_pool.q.bias": biases[:WIDTH],
            "visual.trunk.attn_pool.kv.weight": weights[WIDTH:],
            "visual.trunk.attn_pool.kv.bias": biases[WIDTH:],
            **{f"visual.trunk.attn_pool.proj.{n}": p for n, p in self.pool.out_proj.named_parameters()},
            **{f"visual.trunk.attn_pool.norm.{n}": p for n, p in self.pool_norm.named_parameters()},
            **{f"visual.trunk.attn_pool.mlp.fc1.{n}": p for n, p in self.fc1.named_parameters()},
            **{f"visual.trunk.attn_pool.mlp.fc2.{n}": p for n, p in self.fc2.named_parameters()},
            **{f"text.text_projection.{n}": p for n, p in self.text_projection.named_parameters()},
            "logit_bias": torch.tensor(-9.0),
        }


def saved(folder: Path, towers: Towers, spelling: str, activation: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    open_clip = spelling == "open_clip"
    file = folder / ("open_clip_model.safetensors" if open_clip else "model.safetensors")
    safetensors.save(file, towers.arrays(spelling), {})
    vision = {"num_attention_heads": HEADS, "hidden_act": activation}
    config: dict[str, Any] = {"model_type": towers.kind, "vision_config": vision, "text_config": vision}
    if open_clip:
        cfg: dict[str, Any] = {"heads": HEADS, "head_width": WIDTH // HEADS}
        tanh = {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_pytorch_tanh" else {}
        model = {"vision_cfg": cfg, "text_cfg": {"heads": HEADS, **tanh}, "quick_gelu": activation == "quick_gelu"}
        config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / ("open_clip_config.json" if open_clip else "config.json")).write_text(json.dumps(config))
    return folder


def ours(converted: Any, pixels: np.ndarray, texts: list[np.ndarray]) -> dict[str, np.ndarray]:
    objective: Any = build(converted.config, converted.vocabulary)
    d = converted.config.data
    patches = patchify(pixels.astype(np.float32), PATCH)  # numbers with a point count as normalised
    value = np.zeros((len(texts), d.max_text_tokens), np.int32)
    for row, ids in zip(value, texts, strict=True):
        row[: len(ids)] = ids
    valid = np.arange(value.shape[1]) < np.asarray([len(t) for t in texts])[:, None]

    def group(value: np.ndarray, valid: np.ndarray) -> Any:
        at = np.broadcast_to(np.arange(valid.shape[1], dtype=np.int32), valid.shape)
        tokens = {"value": value, "position": at, "valid": valid}
        return {"visible": tokens, "target": {name: x[:, :0] for name, x in tokens.items()}}

    groups = {"image": group(patches, np.ones(patches.shape[:2], bool)), "text": group(value, valid)}
    with jax.default_matmul_precision("highest"):
        return dict(jax.device_get(jax.jit(objective.embed)(converted.params, {"groups": groups})))


CASES = [
    ("clip", "transformers", "quick_gelu"),
    ("siglip", "transformers", "gelu_pytorch_tanh"),
    ("clip", "open_clip", "gelu"),
    ("siglip", "open_clip", "gelu_pytorch_tanh"),
]


@pytest.mark.parametrize(("kind", "spelling", "activation"), CASES)
def test_two_towers_compute_here_what_they_do_there_and_go_back(
    kind: str, spelling: str, activation: str, tmp_path: Path
) -> None:
    towers = Towers(kind, activation)
    folder = saved(tmp_path / "theirs", towers, spelling, activation)
    converted = convert.import_weights(folder)
    assert converted.format == {"transformers": "clip"}.get(spelling, spelling)
    assert not converted.report.missing
    rng = np.random.default_rng(1)
    pixels = rng.standard_normal((3, PATCH * SIDE, PATCH * SIDE, 3))
    texts = [rng.integers(2, WORDS - 2, n) for n in LENGTHS]
    got = ours(converted, pixels, texts)
    np.testing.assert_allclose(got["image"], towers.pictures(pixels), atol=2e-5)
    np.testing.assert_allclose(got["text"], towers.captions(texts), atol=2e-5)
    compared = check.compare(converted)
    assert compared.close and set(compared.errors) == {"image embeddings", "text embeddings"}, compared.text()
    # Out again, in either spelling: what is read from there computes the same.
    run = tmp_path / "run"
    convert.write_run(converted, run)
    stored = inference.read(str(run))
    for format, name in (("clip", "folder"), ("open_clip", "file.safetensors")):
        report = convert.export_weights(stored, format, tmp_path / name)
        assert not report.unused
        arrays = safetensors.load(tmp_path / name / "model.safetensors" if format == "clip" else tmp_path / name)[0]
        theirs = towers.arrays("transformers" if format == "clip" else "open_clip")
        numbers = {n for n in theirs if n.endswith(("position_ids", "attn_mask"))}
        assert arrays.keys() == theirs.keys() - numbers
        assert {n: x.shape for n, x in arrays.items()} == {n: theirs[n].shape for n in arrays}
        heads = [("model.heads", str(HEADS)), ("contrastive.text_heads", str(HEADS))]
        heads += [("model.activation", {"gelu_pytorch_tanh": "gelu_tanh"}.get(activation, activation))]
        again = convert.import_weights(tmp_path / name, overrides=heads)
        for path, x in jax.tree_util.tree_leaves_with_path(again.params):
            if "embedding/embedding" not in jax.tree_util.keystr(path, simple=True, separator="/"):
                y = converted.params
                for key in path:
                    y = y[key.key]
                np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
        assert ours(again, pixels, texts)["text"] == pytest.approx(got["text"], abs=1e-6)


def test_an_exported_clip_gives_torch_the_same_numbers(tmp_path: Path) -> None:
    towers = Towers("clip", "gelu")
    converted = convert.import_weights(saved(tmp_path / "theirs", towers, "open_clip", "gelu"))
    texts, pixels = [np.array([5, 6, 7])], np.random.default_rng(0).standard_normal((1, 24, 24, 3))
    before = towers.pictures(pixels), towers.captions(texts)
    convert.write_run(converted, tmp_path / "run")
    convert.export_weights(inference.read(str(tmp_path / "run")), "open_clip", tmp_path / "out.safetensors")
    arrays = {
        n: torch.from_numpy(x.copy()).double() for n, x in safetensors.load(tmp_path / "out.safetensors")[0].items()
    }
    towers.class_token, towers.places = arrays["visual.class_embedding"], arrays["visual.positional_embedding"]
    towers.words, towers.text_places = arrays["token_embedding.weight"], arrays["positional_embedding"]
    np.testing.assert_allclose(towers.pictures(pixels), before[0], atol=1e-6)
    np.testing.assert_allclose(towers.captions(texts), before[1], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.pop("text_model.final_layer_norm.bias"), "text.norm.bias|lacks what the model needs"),
        (lambda a: a.pop("text_model.embeddings.position_embedding.weight"), "one tower alone"),
        (lambda a: a.update(extra=np.ones(3, np.float32)), "no place for: extra"),
        (lambda a: a.update({"visual_projection.weight": np.ones((JOINT + 1, WIDTH), np.float32)}), "needs"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_in_one_line(change: Any, said: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, Towers("clip", "gelu"), "transformers", "gelu")
    arrays = dict(safetensors.load(folder / "model.safetensors")[0])
    change(arrays)
    safetensors.save(folder / "model.safetensors", arrays, {})
    with pytest.raises(UserError, match=said) as error:
        convert.import_weights(folder)
    assert "\n" not in str(error.value)


def test_another_picture_and_a_shorter_text_take_their_positions(tmp_path: Path) -> None:
    towers = Towers("clip", "gelu")
    folder = saved(tmp_path, towers, "transformers", "gelu")
    whole = convert.import_weights(folder)
    other = convert.import_weights(folder, overrides=[("data.image_size", "40"), ("data.max_text_tokens", "6")])
    assert other.params["image"]["image"]["position_embedding"].shape == (25, WIDTH)
    np.testing.assert_array_equal(
        other.params["text"]["text"]["position_embedding"], whole.params["text"]["text"]["position_embedding"][:7]
    )
    with pytest.raises(UserError, match="max_text_tokens=40: its positions are for 10 tokens"):
        convert.import_weights(folder, overrides=[("data.max_text_tokens", "40")])


def test_a_run_of_another_layout_is_not_written_as_clip(tmp_path: Path) -> None:
    converted = convert.import_weights(saved(tmp_path / "theirs", Towers("clip", "gelu"), "transformers", "gelu"))
    convert.write_run(converted, tmp_path / "run")
    stored = inference.read(str(tmp_path / "run"))
    config = stored.config.copy_and_resolve_references()
    config.contrastive.text_layout = "plain"
    with pytest.raises(UserError, match="'clip' or 'siglip', both the same"):
        convert.export_weights(dataclasses.replace(stored, config=config), "clip", tmp_path / "out")
    with pytest.raises(UserError, match="objective='contrastive': --to=timm holds models of m3ae"):
        convert.export_weights(stored, "timm", tmp_path / "out.safetensors")
    convert.export_weights(stored, "safetensors", tmp_path / "own.safetensors")
    again = convert.import_weights(tmp_path / "own.safetensors")
    assert again.config.objective == "contrastive" and again.config.contrastive == converted.config.contrastive
    jax.tree.map(np.testing.assert_array_equal, again.params, converted.params)


# --- BERT


class Bert:
    """Of PyTorch's layers, LayerNorm after each residual."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layers = stack(TEXT, "gelu", 1e-12, first=False)
        self.words, self.places, self.types = tensor(WORDS, TEXT), tensor(12, TEXT), tensor(2, TEXT)
        self.norm = drawn(torch.nn.LayerNorm(TEXT, 1e-12))

    def features(self, texts: list[np.ndarray], cls: int, sep: int) -> list[np.ndarray]:
        out = []
        with torch.no_grad():
            for ids in texts:
                whole = [cls, *ids, sep]
                x = self.norm(self.words[whole] + self.places[: len(whole)] + self.types[0])
                out.append(self.layers(x[None])[0, :-1].numpy())
        return out

    def arrays(self, prefix: str, *, old: bool) -> dict[str, np.ndarray]:
        out: dict[str, Any] = {
            "embeddings.word_embeddings.weight": self.words,
            "embeddings.position_embeddings.weight": self.places,
            "embeddings.token_type_embeddings.weight": self.types,
            "pooler.dense.weight": tensor(TEXT, TEXT),
        }
        ends = {"weight": "gamma", "bias": "beta"} if old else {"weight": "weight", "bias": "bias"}
        out |= {f"embeddings.LayerNorm.{ends[n]}": p for n, p in self.norm.named_parameters()}
        for n, layer in enumerate(self.layers.layers):
            at = f"encoder.layer.{n}"
            for end in ("weight", "bias"):
                three = getattr(layer.self_attn, f"in_proj_{end}").chunk(3)
                out |= {f"{at}.attention.self.{part}.{end}": x for part, x in zip(QKV, three, strict=True)}
                out[f"{at}.attention.output.dense.{end}"] = getattr(layer.self_attn.out_proj, end)
                out[f"{at}.attention.output.LayerNorm.{ends[end]}"] = getattr(layer.norm1, end)
                out[f"{at}.intermediate.dense.{end}"] = getattr(layer.linear1, end)
                out[f"{at}.output.dense.{end}"] = getattr(layer.linear2, end)
                out[f"{at}.output.LayerNorm.{ends[end]}"] = getattr(layer.norm2, end)
        return {prefix + name: np.asarray(x.detach(), np.float32) for name, x in out.items()} | {
            "cls.predictions.bias": np.zeros(WORDS, np.float32)
        }


QKV = ("query", "key", "value")


def bert_folder(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save(folder / "model.safetensors", arrays, {})
    names = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", *(f"w{i}" for i in range(WORDS - 4))]
    (folder / "vocab.txt").write_text("\n".join(names) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "num_attention_heads": HEADS}))
    return folder


@pytest.mark.parametrize(("prefix", "old"), [("bert.", True), ("", False)])
def test_bert_computes_here_what_it_does_there(prefix: str, old: bool, tmp_path: Path) -> None:
    model = Bert()
    converted = convert.import_weights(bert_folder(tmp_path / "theirs", model.arrays(prefix, old=old)))
    assert converted.format == "bert" and converted.config.m3ae.layout == "bert"
    assert any("next-sentence head" in line for line in converted.report.unused)
    compared = check.compare(converted)
    assert compared.close and compared.errors, compared.text()
    texts = [np.random.default_rng(n).integers(4, WORDS, n) for n in LENGTHS]
    objective: Any = build(converted.config, converted.vocabulary)
    value = np.zeros((3, converted.config.data.max_text_tokens), np.int32)
    for row, ids in zip(value, texts, strict=True):
        row[: len(ids)] = ids
    at = np.broadcast_to(np.arange(value.shape[1], dtype=np.int32), value.shape)
    tokens = {"value": value, "position": at, "valid": at < np.asarray([[len(t)] for t in texts])}
    part = {"groups": {"text": {"visible": tokens, "target": {n: x[:, :0] for n, x in tokens.items()}}}}
    with jax.default_matmul_precision("highest"):
        encoded = jax.device_get(jax.jit(objective.encode)(converted.params, part))
    for i, want in enumerate(model.features(texts, 3, 2)):
        np.testing.assert_allclose(encoded.pooled["cls"][i], want[0], atol=1e-4)
        np.testing.assert_allclose(encoded.tokens["text"][i, : len(want) - 1], want[1:], atol=1e-4)


def test_a_bert_with_both_spellings_is_refused(tmp_path: Path) -> None:
    arrays = Bert().arrays("bert.", old=True)
    arrays["bert.encoder.layer.0.output.LayerNorm.weight"] = np.ones(TEXT, np.float32)
    with pytest.raises(UserError, match=r"both .*LayerNorm.gamma and .*LayerNorm.weight"):
        convert.import_weights(bert_folder(tmp_path, arrays))
