"""Conversion: another project's weights to a run's folder of ours, and a run's to another project's files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

import m3ae_jax.config as config_lib
import m3ae_jax.data.run_tokenizer as run_tokenizer
import m3ae_jax.inference as inference
import m3ae_jax.report.card as card
from m3ae_jax.atomic import replacing
from m3ae_jax.checkpoint import origin
from m3ae_jax.checkpoint.manager import Checkpoints
from m3ae_jax.checkpoint.meta import STATE_VERSION
from m3ae_jax.convert import albef, bert, clip, m3ae, mae, own, positions, safetensors, torch_file, tree, vitmae
from m3ae_jax.convert.formats import Foreign, Format, reading, set_sizes, unwrapped
from m3ae_jax.convert.keymap import Line, Names, Report, draw, fill
from m3ae_jax.data.order import order_version
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.data.tokens import modality_table, patch_grid
from m3ae_jax.errors import UserError, one_of
from m3ae_jax.models.positions import resize
from m3ae_jax.objectives.base import Objective, build, model_params
from m3ae_jax.paths import local
from m3ae_jax.train.optimizer import optimizer
from m3ae_jax.train.step import TrainState

FORMATS: dict[str, Format] = {
    "m3ae": m3ae.FORMAT,
    "mae": mae.MAE,
    "vitmae": vitmae.FORMAT,
    "timm": mae.TIMM,
    "clip": clip.FORMAT,
    "open_clip": clip.OPEN_CLIP,
    "bert": bert.FORMAT,
    "albef": albef.FORMAT,
    "safetensors": own.FORMAT,
}
Tables = Mapping[str, positions.Table]
"""Another project's tables of positions, by stack."""

_OF_TORCH = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
_TYPES = {stack: tree.path("type", stack=stack, modality="image") for stack in ("encoder", "decoder")}
_LEARNED = tree.path("positions")
_WORDS = "text.words"  # of two towers


@dataclasses.dataclass(frozen=True)
class Converted:
    """Another project's model, in our terms.

    Attributes:
        format: one of `FORMATS`.
        config: resolved.
        params: nested dicts of NumPy arrays.
        report: what went where.
        foreign: theirs, as read.
        vocabulary: number of token ids; 0 without text.
        extra: what the objective has beside the parameters, as a teacher; likewise.
    """

    format: str
    config: ConfigDict
    params: dict[str, Any]
    report: Report
    foreign: Foreign
    vocabulary: int
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def detect(path: Path) -> str:
    """The name of a file's format, by its name and its parameters'.

    Raises:
        UserError: it is none of `FORMATS`.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.suffix in (".pkl", ".npz"):
        return "m3ae"
    if path.suffix == ".safetensors":
        names, metadata = safetensors.load(path)
        if own.METADATA in metadata:
            return "safetensors"
    elif path.name.endswith(_OF_TORCH) or zipfile.is_zipfile(path):
        names, _ = torch_file.load(path)
    else:
        kinds = "; ".join(f"{name}: {format.about}" for name, format in FORMATS.items())
        raise UserError(f"{path}: its format is not known by its name; --format says it, one of {kinds}")
    return _of_names(names)


def _of_names(names: Mapping[str, np.ndarray]) -> str:
    names = unwrapped(names)[0]
    if table := clip.table_of(names):
        return "clip" if table is clip.TRANSFORMERS else "open_clip"
    if albef.is_albef(names):
        return "albef"
    if bert.is_bert(names):
        return "bert"
    return "mae" if "decoder_embed.weight" in unwrapped(names)[0] else "timm"


def _of_folder(path: Path) -> str:
    if (path / "open_clip_config.json").is_file() or (path / "open_clip_model.safetensors").is_file():
        return "open_clip"
    kind = ""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        content = json.loads((path / "config.json").read_bytes())
        kind = "timm" if "pretrained_cfg" in content else str(content.get("model_type"))
    return {"timm": "timm", "clip": "clip", "siglip": "clip", "bert": "bert"}.get(kind, "vitmae")


def import_weights(path: Path, format: str = "", overrides: list[tuple[str, str]] | None = None) -> Converted:
    """Reads another project's weights.

    Args:
        path: a file, or a folder.
        format: one of `FORMATS`; "": as the file looks.
        overrides: config fields that do not follow from the weights, as of the command line.

    Raises:
        UserError: the file is damaged, of another format, or its model cannot be expressed here.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path} is a run of this program: --to and --output write it for others")
    name = format or detect(path)
    if name not in FORMATS:
        raise UserError(one_of("--format", name, FORMATS))
    kind, report = FORMATS[name], Report()
    names = kind.names
    if not kind.folders and path.is_dir():
        raise UserError(f"{path} is a folder, and --format={name} takes a file: {kind.about}")
    foreign = kind.read(path)
    report.notes += foreign.notes
    for file_name, array in foreign.arrays.items():
        if not np.all(np.isfinite(np.asarray(array, np.float32))):
            raise UserError(f"{path}: {file_name} holds numbers that are not finite")
    config = config_lib.default(kind.objective or own.objective_of(foreign, path))
    autoencoder = config.objective == "m3ae"
    config.model.heads = 0
    with reading(path, f"model of format {name}"):  # its facts and shapes may be anything
        if names.layers and autoencoder:
            config.m3ae.decoder_heads = 0
            set_sizes(config, foreign.arrays, names)
        kind.describe(foreign, config, report)
        arrays = dict(foreign.arrays)  # now that what has no place here is folded into what has
        tables = {stack: positions.read(key, arrays.pop(key)) for stack, key in names.tables.items() if key in arrays}
    for stack, table in tables.items():
        file_name = names.tables[stack]
        if table.learned is None and positions.precision(foreign.arrays[file_name]):  # what both then compute with
            exact = positions.write(len(table.cls), table.side, table.offset, None)
            exact[:, 0] = table.cls
            foreign.arrays[file_name] = exact
            report.notes.append(f"positions ({stack}): in half precision there; the fixed ones are computed exactly")
    if tables and autoencoder:
        config.m3ae.use_type_embedding = any(np.any(table.offset) for table in tables.values())
        config.m3ae.image_positions = "sincos" if tables["encoder"].learned is None else "learned"
    if any(field == "objective" for field, _ in overrides or []):
        raise UserError(f"--config.objective: a {name} becomes a run of {config.objective}; leave it out")
    config_lib.apply_overrides(config, overrides or [])
    resolved = _resolve(config, names) if autoencoder else config_lib.resolve(config)
    with reading(path, f"model of format {name}"):
        kind.adapt(foreign, arrays, resolved, report)
    vocabulary = _vocabulary(resolved, foreign, names)
    objective = build(resolved, vocabulary)
    key = jax.random.key(resolved.seed)
    flat = _zeros(objective, key)
    beside = kind.beside_params(foreign, arrays, resolved, report)
    fill(names.key_map(_head_depth(resolved), flat), arrays, flat, report)
    _fold(flat, tables, resolved, report)
    _check(report, kind, name)
    if report.missing:
        fresh = flatten_dict(nn.unbox(jax.jit(objective.init)(key)), sep="/")
        flat |= {name: np.asarray(fresh[name]) for name in report.missing}
    params = unflatten_dict(flat, sep="/")
    of_model = {branch: params.pop(branch) for branch in objective.model_extra}
    extra = _extra(objective, params, key, name, beside, report) | of_model
    return Converted(name, resolved, params, report, foreign, vocabulary, extra)


def _zeros(objective: Objective, key: jax.Array) -> dict[str, np.ndarray]:
    """By path, of the shapes of the parameters, and of what beside them belongs to the model."""

    def fresh(key: jax.Array) -> Any:
        boxed = objective.init(key)
        return model_params(objective, boxed, objective.init_extra(boxed, key) if objective.model_extra else {})

    shapes = flatten_dict(nn.unbox(jax.eval_shape(fresh, key)), sep="/")
    return {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}


def _extra(
    objective: Objective,
    params: Any,
    key: jax.Array,
    name: str,
    beside: Mapping[str, dict[str, np.ndarray]],
    report: Report,
) -> dict[str, Any]:
    """What the objective has beside its parameters, as a run begins with it, with what the file has of it."""
    boxed, kind = jax.eval_shape(objective.init, key), FORMATS[name]

    def make(params: Any) -> Any:
        return nn.unbox(objective.init_extra(nn.meta.replace_boxed(boxed, params), key))

    if not jax.tree.leaves(jax.eval_shape(make, params)):
        return {}
    made = flatten_dict(jax.device_get(jax.jit(make)(params)), sep="/")
    extra = {name: np.array(leaf) for name, leaf in made.items()}
    for branch, arrays in beside.items():
        inside = {
            name.removeprefix(f"{branch}/"): leaf for name, leaf in extra.items() if name.startswith(f"{branch}/")
        }
        of_branch = Report()
        key_map = kind.names.key_map(0, inside) if branch == "teacher" else [Line(name, name) for name in inside]
        fill(key_map, arrays, inside, of_branch)
        if of_branch.missing:
            some = ", ".join(of_branch.missing[:5])
            report.notes.append(f"{branch}: {len(of_branch.missing)} parameters are not in the file: as here: {some}")
            of_branch.missing = []
        _check(of_branch, kind, f"{name} ({branch})")
        report.matched += [(theirs, f"{branch}/{ours}", shape) for theirs, ours, shape in of_branch.matched]
        report.unused += [f"{branch} {name}" for name in of_branch.unused]
    return unflatten_dict(extra, sep="/")


def _head_depth(config: ConfigDict) -> int:
    return config.m3ae.output_head_depth if config.objective == "m3ae" else 0


def _resolve(config: ConfigDict, names: Names) -> ConfigDict:
    for stack in names.blocks:
        if not tree.size(config, stack, "heads"):
            raise UserError(
                f"the weights do not tell how many attention heads the {stack} ({tree.size(config, stack, 'width')} "
                f"wide) has: give --config.{tree.field(stack, 'heads')}=N"
            )
    config.m3ae.decoder_heads = config.m3ae.decoder_heads or config_lib.default().m3ae.decoder_heads
    return config_lib.resolve(config)


def _vocabulary(config: ConfigDict, foreign: Foreign, names: Names) -> int:
    """Words of the model; a tokenizer that is named must have as many."""
    ends = names.layers.get("text", _WORDS) if names.layers else tree.TEXT_TABLE
    table = next((array for key, array in foreign.arrays.items() if key.endswith(ends)), None)
    if table is None:
        return 0
    if config.data.tokenizer:
        words = load_tokenizer(config.data.tokenizer, "name the one that the weights were trained with").vocab_size
        if words != len(table):
            raise UserError(
                f"data.tokenizer={config.data.tokenizer!r} has {words} words, the weights {len(table)}: name the "
                "tokenizer that they were trained with"
            )
    return len(table)


def _fold(flat: dict[str, np.ndarray], tables: Tables, config: ConfigDict, report: Report) -> None:
    """Brings what their tables hold beside the fixed embeddings into parameters of ours."""
    side, filled = patch_grid(config)[0], []
    for stack, table in tables.items():
        if stack == "decoder" and (np.any(table.cls) or table.learned is not None):
            raise UserError("the decoder's position embeddings are learned; here they are fixed sin-cos")
        if np.any(table.cls):
            flat[tree.path("cls")] += table.cls
            report.notes.append(f"CLS position: added to {tree.path('cls')}")
        if _TYPES[stack] in flat:
            flat[_TYPES[stack]][...] = table.offset
            filled.append(_TYPES[stack])
        if stack == "encoder" and table.learned is not None:
            flat[_LEARNED][...] = resize(table.learned, (table.side, table.side), (side, side))
            filled.append(_LEARNED)
        if table.side != side:
            how = "interpolated" if table.learned is not None else "recomputed"
            report.notes.append(
                f"positions ({stack}): {how} for {side} x {side} patches, there are {table.side} x {table.side}"
            )
    if tables:
        kind = "fixed sin-cos, equal to ours" if tables["encoder"].learned is None else "learned"
        report.notes.append(f"positions (encoder): {kind}: m3ae.image_positions={config.m3ae.image_positions}")
        offset = "what their tables have beside it" if config.m3ae.use_type_embedding else "none"
        report.notes.append(f"type embedding: {offset}: m3ae.use_type_embedding={config.m3ae.use_type_embedding}")
        if not any(np.any(table.cls) for table in tables.values()):
            report.notes.append("CLS position: zeros, as here")
    report.missing = [path for path in report.missing if path not in filled]


def _check(report: Report, kind: Format, name: str) -> None:
    """Refuses what would give other outputs than theirs."""
    unknown = [key for key in report.unused if not kind.why_beside(key)]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(
            f"the file has parameters that the model of format {name} has no place for: {', '.join(unknown[:5])}{more}"
        )
    report.unused = [f"{key} ({kind.why_beside(key)})" for key in report.unused]
    decoder = [path for path in report.missing if path.startswith(tree.DECODER)]
    lacking = [path for path in report.missing if path not in decoder and not kind.why_fresh(path)]
    if lacking:
        raise UserError(f"the file lacks what the model needs: {', '.join(lacking[:5])}")
    whys = {kind.why_fresh(path): path for path in report.missing if path not in decoder}
    report.notes += [f"{path}: {why}" for why, path in whys.items()]
    if decoder:
        if any(ours.startswith(tree.DECODER_STACK) for _, ours, _ in report.matched):
            raise UserError(f"the file has a part of the decoder alone, it lacks {', '.join(report.missing[:5])}")
        report.notes.append("the file has no decoder: ours is freshly drawn, so reconstructions mean nothing yet")


def check_free(workdir: Path) -> Path:
    """Where a new run's checkpoints come.

    Raises:
        UserError: there is a run already, or a file.
    """
    folder = workdir / "checkpoints"
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; a run is a folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{workdir} holds a run already: choose another --workdir")
    return folder


def write_run(converted: Converted, workdir: Path, file: str = "", license: str = "") -> None:
    """Makes a run's folder, as training does: config, tokenizer, card, and a checkpoint, of step 0.

    Args:
        converted: what goes into it.
        workdir: the folder.
        file: that was converted.
        license: of the weights, as the user told it.

    Raises:
        UserError: there is a run already.
    """
    folder = check_free(workdir)
    config = converted.config
    if config.data.tokenizer and config.data.tokenizer != "scenes":
        config.data.tokenizer = str(local(config.data.tokenizer, "data.tokenizer").resolve())
    fingerprint = load_tokenizer(config.data.tokenizer).fingerprint if config.data.tokenizer else ""
    params = jax.tree.map(jnp.asarray, converted.params)
    opt_state = optimizer(config, lambda step: jnp.float32(0.0)).init(params)
    state = TrainState(jnp.int32(0), params, opt_state, jax.tree.map(jnp.asarray, converted.extra))
    table = modality_table(config, converted.vocabulary)
    meta = {
        "state_version": STATE_VERSION,
        "order_version": order_version(config.data.crop_rule),
        "train_data": "converted",
        "tokenizer": fingerprint,
        "config": config.to_dict(),
        "modalities": [dataclasses.asdict(modality) for modality in table.values()],
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    with replacing(workdir / "config.json") as fresh:
        fresh.write_text(config_lib.to_json(config), encoding="utf-8")
    if config.data.tokenizer:
        run_tokenizer.keep(config.data.tokenizer, workdir)
    origin.save(workdir, [origin.converted(file, converted.format, license)] if file else [])
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(state, meta, {})
    checkpoints.close()
    card.write(workdir)


def export_weights(stored: inference.Stored, format: str, path: Path, *, encoder_only: bool = False) -> Report:
    """Writes a run's weights for another project.

    Args:
        stored: of `inference.read`.
        format: one of `FORMATS`.
        path: a file, or a folder for ``vitmae``; see `output_of`.
        encoder_only: leaves out the decoder; ``timm`` does so anyhow.

    Raises:
        UserError: the format cannot express the model.
    """
    path = output_of(format, path)
    kind, config = FORMATS[format], stored.config
    _check_expressible(kind, config, format, encoder_only)
    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(stored.params, sep="/").items()}
    if encoder_only:
        flat = {name: leaf for name, leaf in flat.items() if not name.startswith(tree.DECODER)}
    arrays, report = draw(kind.names.key_map(_head_depth(config), flat), flat)
    tabled = _write_tables(arrays, kind.names, flat, config, report)
    report.unused = [name for name in report.unused if name not in tabled]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind.write(path, arrays, config, report)
    except OSError as error:
        raise UserError(f"--output={str(path)!r} cannot be written: {error.strerror}") from None
    return report


def output_of(format: str, path: Path) -> Path:
    """Where `export_weights` writes: a file's name without an ending gets the format's.

    Raises:
        UserError: it is a folder and a file is written, or the other way round, or its ending is another format's.
    """
    if format not in FORMATS:
        raise UserError(one_of("--to", format, FORMATS))
    endings = FORMATS[format].endings
    if (path / "checkpoints").is_dir():
        raise UserError(f"--output={str(path)!r} is a run's folder: name another")
    if not endings:
        if path.is_file():
            raise UserError(f"--output={str(path)!r} is a file: --to={format} writes a folder")
        return path
    if path.is_dir():
        raise UserError(f"--output={str(path)!r} is a folder: name a file, as {path / f'model{endings[0]}'}")
    path = path if path.suffix else path.with_name(path.name + endings[0])
    if path.suffix not in endings:
        raise UserError(f"--output={str(path)!r}: --to={format} writes {' or '.join(endings)}")
    return path


def _check_expressible(kind: Format, config: ConfigDict, name: str, encoder_only: bool) -> None:
    if kind.objective and config.objective != kind.objective:
        raise UserError(f"objective={config.objective!r}: --to={name} holds models of {kind.objective}")
    if config.objective != "m3ae":
        return
    if config.m3ae.layout != "plain" and kind.names.layers and kind is not bert.FORMAT:
        raise UserError(f"m3ae.layout={config.m3ae.layout!r}: --to={name} has no such encoder; --to=safetensors has")
    image_only, has_decoder = "text" not in kind.names.modalities, "decoder" in kind.names.blocks
    if image_only and "image" not in config.data.modalities:
        raise UserError(f"--to={name} is of pictures, the model was trained on text alone")
    if image_only and has_decoder and config.m3ae.output_head_depth:
        raise UserError(f"m3ae.output_head_depth={config.m3ae.output_head_depth}: --to={name} has one linear layer")
    if kind.names.layers and not kind.names.tables and config.m3ae.image_positions == "learned":
        raise UserError(f"m3ae.image_positions='learned': --to={name} has fixed positions alone")
    if config.m3ae.decoder_attention != "self" and not encoder_only and has_decoder:
        raise UserError(
            f"m3ae.decoder_attention={config.m3ae.decoder_attention!r}: --to={name} has no such decoder; "
            "--encoder_only leaves it out"
        )


def _write_tables(
    arrays: dict[str, np.ndarray], names: Names, flat: Mapping[str, np.ndarray], config: ConfigDict, report: Report
) -> set[str]:
    """Adds their position tables; returns which of our parameters are in them."""
    used = set()
    for stack, key in names.tables.items():
        if stack == "decoder" and names.kernel("projection") not in arrays:
            continue
        learned = flat.get(_LEARNED) if stack == "encoder" else None
        arrays[key] = positions.write(
            tree.size(config, stack, "width"), patch_grid(config)[0], flat.get(_TYPES[stack]), learned
        )
        used |= {_TYPES[stack], _LEARNED}
        if _TYPES[stack] in flat:
            report.notes.append(f"type embedding ({stack}): added to {key}")
    return used
