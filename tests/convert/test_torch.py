"""MAE, ViTMAE and ViT of PyTorch, made here with random weights: the same numbers there and here, both ways."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from m3ae_jax import inference
from m3ae_jax.convert import check, convert, safetensors, torch_file
from m3ae_jax.data.images import patchify
from m3ae_jax.errors import UserError
from m3ae_jax.models.embeddings import sincos_2d
from m3ae_jax.objectives.m3ae import M3AE

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch")

WIDTH, DEPTH, HEADS, PATCH, SIDE = 32, 2, 4, 8, 4
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 16, 1, 2
IMAGE = PATCH * SIDE
HEADS_GIVEN = [("model.heads", str(HEADS)), ("m3ae.decoder_heads", str(DECODER_HEADS))]
VISIBLE = np.array([3, 0, 9, 14])
HIDDEN = np.setdiff1d(np.arange(SIDE * SIDE), VISIBLE)


class Block(torch.nn.Module):
    """A block as timm's."""

    def __init__(self, width: int, heads: int, scale: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (torch.nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = torch.nn.ModuleDict(
            {"qkv": torch.nn.Linear(width, 3 * width, bias=bias), "proj": torch.nn.Linear(width, width)}
        )
        self.mlp = torch.nn.ModuleDict(
            {"fc1": torch.nn.Linear(width, 4 * width), "fc2": torch.nn.Linear(4 * width, width)}
        )
        gammas = (torch.nn.ParameterDict({"gamma": torch.nn.Parameter(torch.zeros(width))}) for _ in range(2))
        self.ls1, self.ls2 = gammas if scale else ({"gamma": 1.0}, {"gamma": 1.0})

    def forward(self, x: Any) -> Any:
        b, n, c = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.attn["proj"](mixed) * self.ls1["gamma"]
        hidden = self.mlp["fc2"](torch.nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + hidden * self.ls2["gamma"]


class ViT(torch.nn.Module):
    """An encoder as timm's and MAE's."""

    def __init__(self, **block: Any) -> None:
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + SIDE * SIDE, WIDTH))
        self.patch_embed = torch.nn.ModuleDict({"proj": torch.nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.blocks = torch.nn.ModuleList(Block(WIDTH, HEADS, **block) for _ in range(DEPTH))
        self.norm = torch.nn.LayerNorm(WIDTH, eps=1e-6)

    def encode(self, pixels: Any, visible: np.ndarray) -> Any:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), 1, -1)
        x = torch.cat([cls, x[:, visible]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MAE(ViT):
    """facebookresearch/mae's model, under its names."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder_embed = torch.nn.Linear(WIDTH, DECODER_WIDTH)
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, DECODER_WIDTH))
        self.decoder_pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + SIDE * SIDE, DECODER_WIDTH))
        self.decoder_blocks = torch.nn.ModuleList(Block(DECODER_WIDTH, DECODER_HEADS) for _ in range(DECODER_DEPTH))
        self.decoder_norm = torch.nn.LayerNorm(DECODER_WIDTH, eps=1e-6)
        self.decoder_pred = torch.nn.Linear(DECODER_WIDTH, 3 * PATCH**2)

    def forward(self, pixels: Any, visible: np.ndarray) -> Any:
        x = self.decoder_embed(self.encode(pixels, visible))
        tokens = self.mask_token.repeat(len(x), SIDE * SIDE, 1)
        tokens[:, visible] = x[:, 1:]
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def facebook_sincos(width: int) -> np.ndarray:
    """MAE's own table: of meshgrid(columns, rows) the first is encoded first."""
    grid = np.stack(np.meshgrid(np.arange(SIDE, dtype=np.float32), np.arange(SIDE, dtype=np.float32)))

    def one(position: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=float) / (width / 4))
        out = np.einsum("m,d->md", position.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    table = np.concatenate([one(grid[0]), one(grid[1])], axis=1)
    return np.concatenate([np.zeros([1, width]), table])[None].astype(np.float32)


def drawn(model: Any, seed: int = 0) -> Any:
    """Every parameter is random, so that none is zero or one; the tables are MAE's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if name.endswith(("pos_embed", "position_embeddings")):
                parameter.copy_(torch.from_numpy(facebook_sincos(parameter.shape[-1])))
    return model.eval()


@pytest.fixture(scope="module")
def mae() -> Any:
    return drawn(MAE())


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, IMAGE, IMAGE, 3)).astype(np.float32)


def of_torch(model: Any, pixels: np.ndarray, method: str = "__call__") -> np.ndarray:
    with torch.no_grad():
        return getattr(model, method)(torch.from_numpy(pixels).permute(0, 3, 1, 2), VISIBLE).numpy()


def batch_of(pixels: np.ndarray) -> dict[str, Any]:
    patches = patchify(pixels, PATCH)

    def tokens(at: np.ndarray) -> dict[str, np.ndarray]:
        position = np.broadcast_to(at.astype(np.int32), (len(pixels), len(at)))
        return {"value": patches[:, at], "position": position, "valid": np.ones(position.shape, bool)}

    return {"groups": {"image": {"visible": tokens(VISIBLE), "target": tokens(HIDDEN)}}}


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)


def assert_same_reconstruction(converted: convert.Converted, model: Any, pixels: np.ndarray) -> None:
    got = jax.jit(M3AE(converted.config, 0).predict)(converted.params, batch_of(pixels))["image"]
    assert_close(np.asarray(got), of_torch(model, pixels)[:, HIDDEN])


def assert_same_features(converted: convert.Converted, want: np.ndarray, pixels: np.ndarray) -> None:
    got = jax.jit(M3AE(converted.config, 0).encode)(converted.params, batch_of(pixels))
    assert_close(np.concatenate([got.pooled["cls"][:, None], got.tokens["image"]], axis=1), want)


def stored(converted: convert.Converted) -> inference.Stored:
    return inference.Stored(converted.config, converted.params, 0, "", converted.vocabulary)


def same(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


# --- files -------------------------------------------------------------------------------------------------


def test_a_pth_file_is_read_as_pytorch_reads_it(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    tensors = {
        "float": base.reshape(4, 6),
        "part of a storage": base[5:9],
        "transposed": base.reshape(4, 6).T,
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "long": base.long(),
        "bool": base > 3,
        "parameter": torch.nn.Parameter(base[:3]),
        "no axis": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    import argparse

    args = argparse.Namespace(norm_pix_loss=True)
    torch.save({"model": tensors, "args": args, "epoch": 3}, tmp_path / "x.pth")
    arrays, facts = torch_file.load(tmp_path / "x.pth")
    assert facts["norm_pix_loss"] is True
    assert arrays.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert arrays[name].shape == tuple(tensor.shape)
        assert np.array_equal(arrays[name].astype(np.float64), tensor.detach().double().numpy()), name


def test_a_hostile_pth_file_runs_nothing(tmp_path: Path) -> None:
    proof, file = tmp_path / "proof", tmp_path / "x.pth"

    class Touch:
        def __reduce__(self) -> Any:
            return open, (str(proof), "w")

    torch.save({"model": {"w": torch.zeros(2)}, "x": Touch()}, file)
    assert list(torch_file.load(file)[0]) == ["w"]
    assert not proof.exists()
    torch.load(file, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}."])
def test_a_damaged_pth_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.pth"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth is no"):
        convert.import_weights(file)


def test_safetensors_as_its_own_package_reads_and_writes_it(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy", reason="needs safetensors: pip install safetensors")
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 2), np.float32)}
    safetensors.save(tmp_path / "ours", arrays, {"k": "v"})
    same(package.load_file(tmp_path / "ours"), arrays)
    package.save_file(arrays, tmp_path / "theirs", {"k": "v"})
    loaded, metadata = safetensors.load(tmp_path / "theirs")
    same(loaded, arrays)
    assert metadata == {"k": "v"}


# --- facebookresearch/mae ----------------------------------------------------------------------------------


def test_the_position_tables_are_ours() -> None:
    np.testing.assert_allclose(facebook_sincos(WIDTH)[0, 1:], sincos_2d(WIDTH, (SIDE, SIDE)), atol=1e-6)


def test_a_mae_gives_the_same_reconstruction(mae: Any, pixels: np.ndarray, tmp_path: Path) -> None:
    torch.save({"model": mae.state_dict()}, tmp_path / "mae.pth")
    converted = convert.import_weights(tmp_path / "mae.pth", overrides=HEADS_GIVEN)
    assert converted.format == "mae" and not converted.report.missing and not converted.report.unused
    assert converted.config.model.activation == "gelu" and not converted.config.m3ae.use_type_embedding
    assert_same_reconstruction(converted, mae, pixels)
    assert_same_features(converted, of_torch(mae, pixels, "encode"), pixels)
    assert check.compare(converted).close
    for back in ("back.pth", "back.safetensors"):
        report = convert.export_weights(stored(converted), "mae", tmp_path / back)
        assert not report.unused and not report.notes
        same(convert.import_weights(tmp_path / back, overrides=HEADS_GIVEN).params, converted.params)
    model = MAE()
    model.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True)["model"])
    assert_close(of_torch(model.eval(), pixels), of_torch(mae, pixels))


def test_the_encoder_alone_leaves_a_fresh_decoder(mae: Any, pixels: np.ndarray, tmp_path: Path) -> None:
    state = {name: value for name, value in mae.state_dict().items() if not name.startswith(("decoder", "mask"))}
    torch.save({"model": state}, tmp_path / "mae.pth")
    converted = convert.import_weights(tmp_path / "mae.pth", "mae", [*HEADS_GIVEN, ("m3ae.decoder_depth", "1")])
    assert any("freshly drawn" in note for note in converted.report.notes)
    assert all(path.startswith(("decoder", "image_")) for path in converted.report.missing)
    assert_same_features(converted, of_torch(mae, pixels, "encode"), pixels)


def test_a_cls_position_goes_into_the_cls_token(pixels: np.ndarray, tmp_path: Path) -> None:
    model = drawn(MAE())
    with torch.no_grad():
        model.pos_embed[:, 0] = 0.3
    torch.save(model.state_dict(), tmp_path / "mae.pth")
    converted = convert.import_weights(tmp_path / "mae.pth", overrides=HEADS_GIVEN)
    assert "CLS position: added to encoder/cls_token" in converted.report.notes
    assert_same_reconstruction(converted, model, pixels)
    with torch.no_grad():
        model.decoder_pos_embed[:, 0] = 0.3
    torch.save(model.state_dict(), tmp_path / "mae.pth")
    with pytest.raises(UserError, match="decoder's position embeddings"):
        convert.import_weights(tmp_path / "mae.pth", overrides=HEADS_GIVEN)


def test_another_resolution_takes_other_positions(mae: Any, tmp_path: Path) -> None:
    torch.save(mae.state_dict(), tmp_path / "mae.pth")
    converted = convert.import_weights(
        tmp_path / "mae.pth", overrides=[*HEADS_GIVEN, ("data.image_size", str(2 * IMAGE))]
    )
    assert "positions (encoder): recomputed for 8 x 8 patches, there are 4 x 4" in converted.report.notes
    assert "another size" in check.compare(converted).text()


def test_type_embeddings_go_into_the_tables_and_back(mae: Any, pixels: np.ndarray, tmp_path: Path) -> None:
    torch.save(mae.state_dict(), tmp_path / "mae.pth")
    converted = convert.import_weights(tmp_path / "mae.pth", overrides=HEADS_GIVEN)
    converted.config.m3ae.use_type_embedding = True
    rng = np.random.default_rng(1)
    for stack, width in (("encoder", WIDTH), ("decoder", DECODER_WIDTH)):
        place = converted.params[stack].setdefault("image" if stack == "encoder" else "image_masks", {})
        place["type_embedding"] = rng.standard_normal((1, 1, width)).astype(np.float32)
    report = convert.export_weights(stored(converted), "mae", tmp_path / "back.pth")
    assert not report.unused
    model = MAE()
    model.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True)["model"])
    assert_same_reconstruction(converted, model.eval(), pixels)
    again = convert.import_weights(tmp_path / "back.pth", overrides=HEADS_GIVEN)
    assert again.config.m3ae.use_type_embedding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again.params, converted.params)


def test_what_a_format_cannot_express_is_noted(mae: Any, tmp_path: Path) -> None:
    torch.save(mae.state_dict(), tmp_path / "mae.pth")
    converted = convert.import_weights(tmp_path / "mae.pth", overrides=HEADS_GIVEN)
    converted.config.model.update(activation="gelu_tanh", layer_norm_epsilon=1e-5)
    notes = convert.export_weights(stored(converted), "mae", tmp_path / "back.pth").notes
    assert [note.split(":")[0] for note in notes] == ["DIFFERS", "DIFFERS"]
    converted.config.m3ae.output_head_depth = 1
    with pytest.raises(UserError, match=r"output_head_depth=1"):
        convert.export_weights(stored(converted), "mae", tmp_path / "back.pth")
    converted.config.objective = "mine:Objective"
    with pytest.raises(UserError, match="objective"):
        convert.export_weights(stored(converted), "mae", tmp_path / "back.pth")


# --- timm --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("block", [{}, {"scale": True}, {"bias": False}], ids=str)
def test_a_vit_with_learned_positions_gives_the_same_features(
    block: dict[str, bool], pixels: np.ndarray, tmp_path: Path
) -> None:
    model = drawn(ViT(**block))
    with torch.no_grad():
        model.pos_embed.copy_(torch.randn(model.pos_embed.shape, generator=torch.Generator().manual_seed(3)))
    arrays = {name: value.numpy() for name, value in model.state_dict().items()} | {
        "head.weight": np.zeros((10, WIDTH), np.float32)
    }
    safetensors.save(tmp_path / "vit.safetensors", arrays, {})
    overrides = [*HEADS_GIVEN[:1], ("m3ae.decoder_width", "16"), ("m3ae.decoder_depth", "1")]
    converted = convert.import_weights(tmp_path / "vit.safetensors", overrides=overrides)
    assert converted.format == "timm" and converted.config.m3ae.image_positions == "learned"
    assert converted.report.unused == ["head.weight (of its classifier)"]
    assert_same_features(converted, of_torch(model, pixels, "encode"), pixels)
    assert check.compare(converted).close
    report = convert.export_weights(stored(converted), "timm", tmp_path / "back.safetensors")
    assert all(name.startswith("decoder/") for name in report.unused)
    again = convert.import_weights(tmp_path / "back.safetensors", overrides=overrides)
    same(again.params["encoder"], converted.params["encoder"])
    larger = convert.import_weights(
        tmp_path / "vit.safetensors", overrides=[*overrides, ("data.image_size", str(2 * IMAGE))]
    )
    assert larger.params["encoder"]["image"]["position_embedding"].shape == (4 * SIDE * SIDE, WIDTH)
    assert "positions (encoder): interpolated for 8 x 8 patches, there are 4 x 4" in larger.report.notes


def test_a_vit_of_another_build_is_refused(tmp_path: Path) -> None:
    arrays = {name: value.numpy() for name, value in drawn(ViT()).state_dict().items()}
    safetensors.save(tmp_path / "vit.safetensors", arrays | {"reg_token": np.zeros((1, 4, WIDTH))}, {})
    with pytest.raises(UserError, match="no place for: reg_token"):
        convert.import_weights(tmp_path / "vit.safetensors", overrides=HEADS_GIVEN[:1])


# --- Hugging Face ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vitmae() -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=IMAGE,
        patch_size=PATCH,
        decoder_hidden_size=DECODER_WIDTH,
        decoder_num_hidden_layers=DECODER_DEPTH,
        decoder_num_attention_heads=DECODER_HEADS,
        decoder_intermediate_size=4 * DECODER_WIDTH,
        layer_norm_eps=1e-5,
    )
    return drawn(transformers.ViTMAEForPreTraining(config))


def of_vitmae(model: Any, pixels: np.ndarray) -> np.ndarray:
    """Its predictions `[N, L, P]`; the noise leaves the patches of `VISIBLE` visible."""
    noise = np.full((len(pixels), SIDE * SIDE), 0.9, np.float32)
    noise[:, VISIBLE] = [0.1, 0.2, 0.3, 0.4]
    with torch.no_grad():
        return model(torch.from_numpy(pixels).permute(0, 3, 1, 2), noise=torch.from_numpy(noise)).logits.numpy()


def assert_same_as_vitmae(converted: convert.Converted, model: Any, pixels: np.ndarray) -> None:
    got = jax.jit(M3AE(converted.config, 0).predict)(converted.params, batch_of(pixels))["image"]
    assert_close(np.asarray(got), of_vitmae(model, pixels)[:, HIDDEN])


@pytest.mark.slow
def test_a_vitmae_gives_the_same_reconstruction(vitmae: Any, pixels: np.ndarray, tmp_path: Path) -> None:
    vitmae.save_pretrained(tmp_path / "hf")
    converted = convert.import_weights(tmp_path / "hf")
    assert converted.format == "vitmae" and not converted.report.missing and not converted.report.unused
    assert converted.config.model.layer_norm_epsilon == 1e-5
    assert_same_as_vitmae(converted, vitmae, pixels)
    assert check.compare(converted).close
    report = convert.export_weights(stored(converted), "vitmae", tmp_path / "back")
    assert not report.unused
    again = convert.import_weights(tmp_path / "back")
    same(again.params, converted.params)
    assert again.config == converted.config
    loaded, info = type(vitmae).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(of_vitmae(loaded.eval(), pixels), of_vitmae(vitmae, pixels))


@pytest.mark.slow
def test_its_parameters_as_they_are_in_memory(vitmae: Any, pixels: np.ndarray, tmp_path: Path) -> None:
    vitmae.save_pretrained(tmp_path / "hf")
    arrays = {name: value.numpy() for name, value in vitmae.state_dict().items()}
    safetensors.save(tmp_path / "hf" / "model.safetensors", arrays, {})
    assert_same_as_vitmae(convert.import_weights(tmp_path / "hf"), vitmae, pixels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value", "match"),
    [("model_type", "vit", "read are 'vit_mae'"), ("hidden_act", "relu", "hidden_act='relu'")],
)
def test_another_folder_is_refused(vitmae: Any, tmp_path: Path, field: str, value: str, match: str) -> None:
    vitmae.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {field: value}))
    with pytest.raises(UserError, match=match):
        convert.import_weights(tmp_path)
