"""The configuration: its defaults, its checks, and the values that follow from it.

A config file (``configs/*.py``) starts from `default` and changes fields; the command line changes more
(``--config.model.text_mask_ratio=0.9``); `resolve` then checks everything and fills in what follows.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m3ae_jax.errors import UserError, one_of

SIZES: dict[str, tuple[int, int, int]] = {
    # width, depth, heads of the encoder; the decoder is always 512 / 8 / 16 (paper and reference, section 1.3)
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    # Beyond the paper: encoders of about 1 and 4 billion parameters, heads of 64 channels.
    "giant": (1536, 36, 24),
    "enormous": (2560, 52, 40),
}
MODALITIES = ("image", "text")
PROGRAM_FIELDS = (
    "micro_batches",
    "mesh.",
    "model.unroll",
    "model.remat",
    "model.attention",
    "model.attention_head_groups",
    "loss.vocabulary_blocks",
)
"""Fields (``group.``: all in it) that change how a step is computed, and neither its numbers (up to rounding, and
to which numbers dropout draws) nor the parameters."""
CROPPED = ("data", "eval.linear_probe", "eval.finetune")
"""Groups that say how training pictures are cropped."""
DURATION_UNITS = ("steps", "examples", "epochs")

_BUILDER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]")  # of tfds: ``module:BuilderClass``; not ``mnist:3.0.1``, ``gs://``

CC12M_MEAN = (0.5762, 0.5503, 0.5213)
CC12M_STD = (0.3207, 0.3169, 0.3307)


def default() -> ConfigDict:
    """The paper's recipe for the base size: every field that exists, with its default and meaning."""
    c = ConfigDict()
    c.seed = 42  # of parameters, order, augmentation, masks and dropout
    c.objective = "m3ae"  # a name under objectives/, or an import path "package.module:Class"
    c.batch_size = 4096  # examples a step, over all devices and hosts
    c.micro_batches = 1  # parts of a batch computed one after the other; the loss is the whole batch's
    c.duration = "100 epochs"  # "N steps", "N examples" or "N epochs"
    c.init_from = ""  # a run's folder or checkpoint: starts from its weights alone

    c.model = ConfigDict()
    c.model.size = "base"  # small, base, large, huge, giant, enormous; the three encoder fields below win over it
    c.model.width = 0  # 0: as `size` says
    c.model.depth = 0
    c.model.heads = 0
    c.model.mlp_ratio = 4.0
    c.model.decoder_width = 512
    c.model.decoder_depth = 8
    c.model.decoder_heads = 16
    # What the decoder's target tokens attend to: self: each other and the visible ones, as in the paper; cross: the
    # visible ones alone, so that none depends on which others are asked (CrossMAE, arXiv 2401.14391).
    c.model.decoder_attention = "self"
    c.model.image_target_share = 1.0  # of the hidden patches, how many a training step restores: drawn anew each step
    c.model.output_head_depth = 0  # 0: one linear layer a modality; n: n hidden layers before it
    c.model.use_type_embedding = True  # a learned vector a modality, in encoder and decoder
    c.model.image_positions = (
        "sincos"  # in the encoder: sincos (fixed), or learned, as ViTs of other projects have them
    )
    c.model.activation = "gelu_tanh"  # gelu_tanh (the reference's approximation), or gelu (by erf, as PyTorch's)
    c.model.layer_norm_epsilon = 1e-6
    c.model.image_mask_ratio = 0.75
    c.model.text_mask_ratio = 0.75
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.drop_path = 0.0
    c.model.compute_dtype = "auto"  # auto: bfloat16 on accelerators, float32 on a CPU; parameters stay float32
    c.model.unroll = False  # compile the layers one by one instead of as a loop; same parameters
    # What the backward pass computes anew: none, dots (all but products with weights), attention (all but the result of
    # attention by head groups), full.
    c.model.remat = "none"
    c.model.attention = "xla"  # xla; a fused kernel: cudnn (NVIDIA GPUs), flash (TPUs)
    c.model.attention_head_groups = 1  # of xla: heads worked on one group after the other, in encoder and decoder

    c.loss = ConfigDict()
    c.loss.image_weight = 1.0
    c.loss.text_weight = 0.5
    c.loss.normalize_patches = (
        False  # pixel targets with zero mean and unit variance in each patch (MAE's norm_pix_loss)
    )
    c.loss.text_average = "example"  # example: mean over captions of each caption's mean; token: mean over tokens

    c.loss.vocabulary_blocks = 1  # n > 1: logits exist for one block of words at a time

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1.5e-4  # for 256 examples; the peak is this times batch_size / 256
    c.optimizer.final_learning_rate = 0.0  # where the cosine ends, scaled likewise
    c.optimizer.warmup = "5 epochs"
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.05
    c.optimizer.no_decay = (
        "bias",
        "scale",
        "embedding",
        "cls_token",
    )  # parameters whose name ends so are not decayed
    c.optimizer.clip_norm = 0.0  # global gradient norm; 0: off
    c.optimizer.first_moment_dtype = "float32"  # or bfloat16: two bytes a parameter less

    c.mesh = ConfigDict()
    c.mesh.preset = "dp"  # dp: parameters whole on each device; fsdp: over 16; fsdp_tp: heads and MLPs over 2 besides
    c.mesh.data = 0  # devices along each axis; 0: as the preset says, or what remains
    c.mesh.fsdp = 0
    c.mesh.tensor = 0
    c.mesh.rules = ()  # changes to parallel.mesh.RULES, "LOGICAL:MESH" or "LOGICAL:" (kept whole)

    c.data = ConfigDict()
    c.data.modalities = MODALITIES  # ("image",) is MAE, ("text",) masked language modelling
    c.data.train = source_fields("train")
    c.data.val = source_fields("val")
    c.data.mixture = ConfigDict()  # several sources in place of data.train: {name: source_fields()}
    c.data.mixture_rows = 0  # every kind of data has a multiple of these rows in a batch; 0: see mixture.grain_of
    c.data.epoch_source = ""  # of a mixture: whose passes durations in epochs count; "": that with the largest weight
    c.data.scenes = ConfigDict()  # difficulty of the built-in data set
    c.data.scenes.seed = 0
    c.data.scenes.image_size = 64
    c.data.scenes.min_objects = 1
    c.data.scenes.max_objects = 3
    c.data.scenes.clutter = 0
    c.data.scenes.num_examples = 2**31  # an epoch; more than any run draws
    c.data.image_size = 256
    c.data.patch_size = 16
    c.data.image_mean = CC12M_MEAN
    c.data.image_std = CC12M_STD
    c.data.crop_scale = (0.2, 1.0)
    c.data.crop_ratio = (3 / 4, 4 / 3)
    c.data.flip = True
    c.data.tokenizer = ""  # FILE.model (SentencePiece), vocab.txt (BERT WordPiece) or "scenes"
    c.data.max_text_tokens = 64
    c.data.max_bad_fraction = 0.05  # of the examples; above it (and after 1,000) a run stops
    c.data.threads = 0  # that read and decode, of each process; 0: one a core. More help where reading waits
    c.data.caption_fraction = 1.0  # share of the training examples that keep their caption

    c.anomaly = ConfigDict()
    # A step changes nothing but is counted if its loss or gradient is not finite, or its loss lies so many standard
    # deviations above the mean of the last 128 steps' (0: however high).
    c.anomaly.spike = 10.0
    c.anomaly.stop_after = 20  # skipped steps in a row; then the run stops

    c.log_every = "50 steps"
    c.checkpoint = ConfigDict()
    c.checkpoint.every = "1 epochs"
    c.checkpoint.keep = 2  # newest ones; the best and the last are kept besides
    c.eval = ConfigDict()
    c.eval.every = "1 epochs"
    c.eval.evals_every = ""  # duration between runs of `evals` in training; "": at the end alone
    c.eval.examples = 4096  # of the validation source, the same ones each time
    c.eval.batch_size = 256
    c.eval.pictures = 8  # reconstructions drawn at each evaluation; 0: none
    # Labelled data of knn, probe, few_shot and ood: of `train` and `test` the same classes, `outside` has others. Where
    # no path is given and data.val is `scenes`: the scenes' own, by `label`.
    c.eval.train = source_fields("train")
    c.eval.test = source_fields("val")
    c.eval.outside = source_fields("val")
    c.eval.label = "shape"  # of scenes: shape, color or color_shape of the largest object; count, of all objects
    c.eval.train_examples = 10_000  # at most; a random choice, the same for every run
    c.eval.test_examples = 10_000
    c.eval.pairs = 1000  # of data.val, for retrieval and masked_prediction
    c.eval.scored_pairs = 64  # of retrieval by restored words: each picture with each caption
    c.eval.robustness = ConfigDict()
    c.eval.robustness.epsilons = (1.0, 2.0, 4.0, 8.0)  # of the attacks: how far a pixel value may move, of 255
    c.eval.robustness.pgd_steps = 10
    c.eval.robustness.examples = 1000  # at most so many of eval.test: an attack costs as much as training on them
    c.eval.robustness.pooling = "cls"  # the features attacked: cls, or mean of the patches' tokens
    c.eval.attention = ConfigDict()
    c.eval.attention.layer = -1  # of the encoder, from 0; -1: the last
    c.eval.attention.examples = 64  # of data.val, over which figures are means
    c.eval.attention.pictures = 4  # pairs that are drawn
    c.eval.tsne = ConfigDict()
    c.eval.tsne.feature = "image/cls"  # image, text or both / cls, or mean of the other tokens
    c.eval.tsne.beside = ""  # another run's folder or checkpoint, drawn beside; "": the untrained encoder
    # The paper's protocols on eval.train and eval.test; rates, epochs and augmentation are those of section 1.3 there.
    c.eval.linear_probe = supervised_fields()
    c.eval.linear_probe.batch_size = 2048
    c.eval.linear_probe.duration = "90 epochs"
    c.eval.linear_probe.warmup = "10 epochs"
    c.eval.linear_probe.learning_rate = 0.1  # for 256 examples, as optimizer.learning_rate
    c.eval.linear_probe.optimizer = "lars"  # or sgd
    c.eval.linear_probe.momentum = 0.9
    c.eval.linear_probe.weight_decay = 0.0
    c.eval.linear_probe.untrained = True  # a second head on an untrained encoder, for comparison
    c.eval.finetune = supervised_fields()
    c.eval.finetune.batch_size = 1024
    c.eval.finetune.duration = "100 epochs"
    c.eval.finetune.warmup = "5 epochs"
    c.eval.finetune.learning_rate = 1e-3  # whatever the batch size
    c.eval.finetune.b1 = 0.9
    c.eval.finetune.b2 = 0.999
    c.eval.finetune.weight_decay = 0.05
    c.eval.finetune.layer_decay = 0.75  # each layer's rate is that of the one above times this
    c.eval.finetune.drop_path = 0.1
    c.eval.finetune.mixup = 0.8  # both parameters of the beta distribution; 0: no mixup
    c.eval.finetune.cutmix = 1.0  # likewise
    c.eval.finetune.cutmix_probability = 0.5  # of a step, where there are both
    c.eval.finetune.label_smoothing = 0.1
    c.eval.finetune.rand_augment = 9.0  # magnitude, of at most 10; 0: off
    c.eval.alone = False  # of configs/eval/*.py: --mode=eval takes what they do not set from the checkpoint
    c.stall = ConfigDict()  # seconds without a step, or anything else that is done; 0: never
    c.stall.report_after = 600.0  # then the stacks of all threads are printed
    c.stall.stop_after = 3600.0  # then the process ends, to be started again
    c.profile = ""  # "A-B": a trace of the steps A to B, for TensorBoard
    c.evals = ()  # names under evals/, run at the end of training, each eval.evals_every, and with --mode=eval
    return c


def supervised_fields() -> ConfigDict:
    """The fields that linear probe and fine-tuning share."""
    c = ConfigDict()
    c.input = "image"  # image, text or both
    c.pooling = "cls"  # cls, or mean of the other tokens
    c.crop_scale = (0.08, 1.0)  # of the training pictures, as data.crop_scale
    c.crop_ratio = (3 / 4, 4 / 3)
    c.flip = True  # false where classes or captions speak of left and right
    return c


def source_fields(split: str = "train") -> ConfigDict:
    """The fields of one source, ``config.data.train`` for one."""
    source = ConfigDict()
    # webdataset, tfrecord, array_record, hdf5, parquet, folder, class_folders, text, tfds, scenes, or "module:Class"
    source.source = "webdataset"
    source.path = ""  # files: a folder, a glob, DIR/{00000..00099}.tar, or several with commas; tfds: a name
    source.split = split  # of tfds, of hdf5 with several, and of scenes: train, val, val_novel
    source.image_key = ""  # field or column of the picture; "": the usual names
    source.caption_key = ""  # of the caption
    source.label_key = ""  # of the class
    source.captions = "draw"  # of a picture with several: draw, one each time; all, an example each
    source.template = ""  # makes a caption of a class name: "a photo of a {}"
    # In a mixture: which of its modalities are used (all that it holds if empty), and its share of the examples.
    source.modalities = ()
    source.weight = 1.0
    return source


def memory_lean(config: ConfigDict, head_groups: int = 4) -> ConfigDict:
    """Makes room for the largest batch a chip: nothing is kept that can be computed anew, parameters lie over 16 chips.

    Where there is room to spare ``--mode=plan --search`` finds what is faster.
    """
    config.mesh.preset = "fsdp"
    config.model.remat = "full"
    config.model.attention_head_groups = head_groups
    config.loss.vocabulary_blocks = 8
    return config


def image_only(config: ConfigDict) -> ConfigDict:
    """Turns an M3AE config into its MAE twin: pictures alone, no type embedding, as the reference trains it."""
    config.data.modalities = ("image",)
    config.model.use_type_embedding = False
    return config


# --- the command line -------------------------------------------------------------------------------------


def split_overrides(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Separates ``--config.a.b=value`` (or ``--config.a.b value``) from a program's other arguments.

    Returns:
        The overrides as (path, text), and the remaining arguments.

    Raises:
        UserError: an override without a value.
    """
    overrides, rest, queue = [], [], list(arguments)
    while queue:
        argument = queue.pop(0)
        match = re.fullmatch(r"--?config\.([^=]*)(?:=(.*))?", argument, flags=re.DOTALL)
        if not match:
            rest.append(argument)
            continue
        path, text = match[1], match[2]
        if text is None:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"--config.{path} needs a value, as --config.{path}=VALUE")
            text = queue.pop(0)
        overrides.append((path, text))
    return overrides, rest


def apply_overrides(config: ConfigDict, overrides: list[tuple[str, str]]) -> None:
    """Sets fields from the command line's text, checked against the type each field has.

    Raises:
        UserError: no such field (with the nearest one), a group instead of a field, or a value of another type.
    """
    for path, text in overrides:
        fields = dict(_leaves(config))
        if path not in fields:
            raise UserError(_no_such_field(path, list(fields)))
        group, _, name = path.rpartition(".")
        target = _get(config, group) if group else config
        target[name] = _parse_value(path, fields[path], text)


def _no_such_field(path: str, names: list[str]) -> str:
    inside = [name for name in names if name.startswith(path + ".")]
    if inside:
        return f"--config.{path} is a group of fields: set one of {', '.join(inside)}"
    group = path.rpartition(".")[0]
    siblings = [name for name in names if name.rpartition(".")[0] == group]
    beside = ", ".join(siblings or sorted({name.split(".")[0] for name in names}))
    return f"--config.{path}: no such field; did you mean --config.{_nearest(path, names)}? Beside it are: {beside}"


def _nearest(path: str, names: list[str]) -> str:
    """The field most like `path`: one with its last part in another group first, then by the whole."""
    last = path.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    return difflib.get_close_matches(path, same or names, n=1, cutoff=0.0)[0]


def _parse_value(path: str, current: Any, text: str) -> Any:
    try:
        if isinstance(current, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(current, int):
            return int(text)
        if isinstance(current, float):
            return float(text)
        if isinstance(current, tuple):
            return _parse_tuple(path, text)
        return text
    except (ValueError, SyntaxError, KeyError):
        kinds = {bool: "true or false", int: "an integer", float: "a number", tuple: "a tuple such as"}
        example = f" {current!r}" if isinstance(current, tuple) else f" (now {current!r})"
        raise UserError(f"--config.{path}={text!r} is not {kinds[type(current)]}{example}") from None


_NUMBER_TUPLES = (
    "data.crop_scale",
    "data.crop_ratio",
    "data.image_mean",
    "data.image_std",
    "eval.robustness.epsilons",
    "eval.linear_probe.crop_scale",
    "eval.linear_probe.crop_ratio",
    "eval.finetune.crop_scale",
    "eval.finetune.crop_ratio",
)


def _parse_tuple(path: str, text: str) -> tuple[Any, ...]:
    """A Python tuple or list, or bare items with commas, in brackets or not: ``(0.2, 1.0)``, ``image,text``."""
    numbers = path in _NUMBER_TUPLES
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        inside = text.strip()[1:-1] if text.strip()[:1] + text.strip()[-1:] in ("()", "[]") else text
        value = tuple(part.strip() for part in inside.split(",") if part.strip())
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(v, (int, float) if numbers else str) and not isinstance(v, bool) for v in value):
        raise ValueError(text)
    return tuple(map(float, value)) if numbers else value


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# --- saving and loading ------------------------------------------------------------------------------------


def load(path: str) -> ConfigDict:
    """Loads a config: a Python file with ``get_config()``, or the ``config.json`` that a run saved.

    Raises:
        UserError: no such file (with the nearest one beside it), or it gives no config.
    """
    file = Path(path)
    if not file.is_file():
        beside = sorted(p.name for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, beside, n=1)
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        found = f" (there are {', '.join(beside)})" if beside else ""
        raise UserError(f"--config={path!r}: no such file{found}{hint}")
    if file.suffix == ".json":
        return from_json(file.read_bytes())
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path!r} is neither a Python file nor a run's config.json")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={path!r} has no function get_config()")
    config = default()
    _merge(config, module.get_config().to_dict(), "")
    return config


def to_json(config: ConfigDict) -> str:
    """The config as JSON (tuples become lists; `from_json` turns them back)."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str | bytes) -> ConfigDict:
    """Reads what `to_json` wrote.

    Raises:
        UserError: a field is unknown to this version, or the text is no JSON object.
    """
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the config is not JSON: {error}") from None
    if not isinstance(stored, dict):
        raise UserError("the config is not a JSON object")
    config = default()
    _merge(config, stored, "")
    return config


def _merge(config: ConfigDict, stored: dict[str, Any], prefix: str) -> None:
    for key, value in stored.items():
        if prefix == "data.mixture.":
            if "." in key:
                raise UserError(f"the config's {prefix}{key}: the name of a source has no dot")
            config[key] = source_fields()
        if key not in config:
            near = _nearest(prefix + key, [prefix + name for name, _ in _leaves(config)])
            raise UserError(f"the config's field {prefix}{key} is unknown here; did you mean {near}?")
        if isinstance(config[key], ConfigDict):
            if not isinstance(value, dict):
                raise UserError(f"the config's {prefix}{key}={value!r} should be a group of fields")
            _merge(config[key], value, f"{prefix}{key}.")
        else:
            try:
                if value is None:
                    raise TypeError
                config[key] = tuple(value) if isinstance(value, list) else value
            except (TypeError, ValueError, AttributeError):  # the last two of groups with odd names
                kind = type(config[key]).__name__
                raise UserError(f"the config's field {prefix}{key}={value!r} is not of type {kind}") from None


def check_named_code(path: str, config: ConfigDict, overrides: list[tuple[str, str]]) -> None:
    """Refuses code that a run's config.json names by an import path, unless the command line names it too.

    Such a file comes with other people's checkpoints, and what it names would be imported and so run. A Python file
    is code itself: who gives one has decided.

    Args:
        path: the file that the config was loaded from.
        config: with the overrides applied.
        overrides: those of the command line, as (path, text).

    Raises:
        UserError: it names code; with the overrides that allow it.
    """
    if Path(path).suffix != ".json":
        return
    given = {field for field, _ in overrides}
    found = {field: value for field, value in _named_code(config).items() if field not in given}
    if not found:
        return
    said = ", ".join(f"{field}={value!r}" for field, value in found.items())
    # Quoted, as the line may be copied into a shell.
    allow = " ".join(shlex.quote(f"--config.{field}={_printable(value)}") for field, value in found.items())
    raise UserError(f"{path} names code to import: {said}; if you trust it, name it on the command line too: {allow}")


def _named_code(config: ConfigDict) -> dict[str, str]:
    """The fields that hold an import path, ``package.module:Class``."""
    fields = {"objective": str(config.objective)}
    for group, spec in _source_specs(config).items():
        fields[f"{group}.source"] = str(spec.source)
        if spec.source == "tfds" and _BUILDER.match(str(spec.path)):
            fields[f"{group}.path"] = spec.path
    return {field: value for field, value in fields.items() if ":" in value}


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]


def difference(a: ConfigDict, b: ConfigDict) -> list[tuple[str, Any, Any]]:
    """Fields that differ, as (name, value in `a`, value in `b`)."""
    left, right = dict(_leaves(a)), dict(_leaves(b))
    return [(name, left.get(name), right.get(name)) for name in right if left.get(name) != right.get(name)]


def apply_difference(config: ConfigDict, changes: list[tuple[str, Any, Any]]) -> None:
    """Sets the fields of a `difference` to their second values."""
    for name, _, value in changes:
        group, _, leaf = name.rpartition(".")
        target = _get(config, group) if group else config
        target[leaf] = value


def names(config: ConfigDict) -> list[str]:
    """All fields, as ``group.name``."""
    return [name for name, _ in _leaves(config)]


def is_among(name: str, fields: tuple[str, ...]) -> bool:
    """Whether a field's name is in a list of names and of groups (``group.``)."""
    return name in fields or name.startswith(tuple(field for field in fields if field.endswith(".")))


# --- checks and derived values -----------------------------------------------------------------------------


def parse_duration(name: str, text: str) -> tuple[float, str]:
    """Splits "100 epochs" into (100.0, "epochs").

    Raises:
        UserError: not a positive number and one of steps, examples, epochs.
    """
    match = re.fullmatch(r"\s*([\d_.]+(?:e\d+)?)\s*([a-z]+)\s*", str(text))
    forms = 'a duration is "N steps", "N examples" or "N epochs"'
    if not match:
        raise UserError(f"{name}={text!r}: {forms}")
    unit = match[2] if match[2].endswith("s") else match[2] + "s"
    if unit not in DURATION_UNITS:
        raise UserError(f"{one_of(name + ' unit', match[2], DURATION_UNITS)}: {forms}")
    try:
        amount = float(match[1])
    except ValueError:
        raise UserError(f"{name}={text!r}: {forms}") from None
    if not math.isfinite(amount):
        raise UserError(f"{name}={text!r}: {forms}")
    return amount, unit


def parse_profile(text: str) -> tuple[int, int] | None:
    """First and last step of the field `profile`, ``"A-B"``; None if it is empty.

    Raises:
        UserError: not of this form.
    """
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", text)
    if not text:
        return None
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f'profile={text!r}: "A-B", the first and the last step, from 1 on')
    return int(match[1]), int(match[2])


def steps(name: str, text: str, batch_size: int, examples: int) -> int:
    """A duration in steps.

    Args:
        name: the field, for the message.
        text: the duration.
        batch_size: examples a step.
        examples: examples in the training source (an epoch).
    """
    amount, unit = parse_duration(name, text)
    per_step = {"steps": 1.0, "examples": batch_size, "epochs": batch_size / examples}[unit]
    return round(amount / per_step)


def resolve(config: ConfigDict) -> ConfigDict:
    """A checked copy with the encoder's size filled in.

    Raises:
        UserError: a value that cannot work, told by field, value and what is allowed.
    """
    c = config.copy_and_resolve_references()
    _check_values(c)
    width, depth, heads = SIZES[c.model.size]
    c.model.width = c.model.width or width
    c.model.depth = c.model.depth or depth
    c.model.heads = c.model.heads or heads
    for name in ("", "decoder_"):
        width, heads = c.model[name + "width"], c.model[name + "heads"]
        if width % heads:
            raise UserError(f"model.{name}width={width} is not divisible by model.{name}heads={heads}")
        if width % 4:
            raise UserError(f"model.{name}width={width} is not divisible by 4, as the 2-D sin-cos positions need")
        groups = c.model.attention_head_groups
        if heads % groups:
            raise UserError(f"model.{name}heads={heads} is not divisible by model.attention_head_groups={groups}")
    if c.model.attention != "xla" and (c.model.attention_dropout or c.model.attention_head_groups > 1):
        raise UserError(
            f"model.attention={c.model.attention!r} has no dropout and no head groups: set model.attention_dropout=0 "
            "and model.attention_head_groups=1, or model.attention=xla"
        )
    if c.batch_size % c.micro_batches:
        raise UserError(f"batch_size={c.batch_size} is not divisible by micro_batches={c.micro_batches}")
    if c.data.image_size % c.data.patch_size:
        raise UserError(f"data.image_size={c.data.image_size} is not divisible by data.patch_size={c.data.patch_size}")
    return c


def _check_values(c: ConfigDict) -> None:
    if c.model.size not in SIZES:
        raise UserError(one_of("model.size", c.model.size, SIZES))
    modalities = tuple(c.data.modalities)
    if not modalities or any(m not in MODALITIES for m in modalities) or len(set(modalities)) != len(modalities):
        raise UserError(f"data.modalities={modalities!r}: a non-empty choice of 'image' and 'text'")
    c.data.modalities = tuple(m for m in MODALITIES if m in modalities)
    for name, allowed in (
        ("loss.text_average", ("example", "token")),
        ("model.decoder_attention", ("self", "cross")),
        ("model.compute_dtype", ("auto", "float32", "bfloat16")),
        ("model.activation", ("gelu_tanh", "gelu")),
        ("model.image_positions", ("sincos", "learned")),
        ("model.remat", ("none", "dots", "attention", "full")),
        ("model.attention", ("xla", "cudnn", "flash")),
        ("optimizer.first_moment_dtype", ("float32", "bfloat16")),
        ("mesh.preset", ("dp", "fsdp", "fsdp_tp")),
        ("eval.robustness.pooling", ("cls", "mean")),
        ("eval.tsne.feature", tuple(f"{of}/{how}" for of in ("image", "text", "both") for how in ("cls", "mean"))),
        ("eval.linear_probe.input", ("image", "text", "both")),
        ("eval.linear_probe.pooling", ("cls", "mean")),
        ("eval.linear_probe.optimizer", ("lars", "sgd")),
        ("eval.finetune.input", ("image", "text", "both")),
        ("eval.finetune.pooling", ("cls", "mean")),
    ):
        if _get(c, name) not in allowed:
            raise UserError(one_of(name, _get(c, name), allowed))
    for name, low, high in _RANGES:
        if not low <= _get(c, name) <= high:
            raise UserError(f"{name}={_get(c, name)!r} is not between {low} and {high}")
    for name in (
        "duration",
        "optimizer.warmup",
        "log_every",
        "checkpoint.every",
        "eval.every",
        "eval.linear_probe.duration",
        "eval.linear_probe.warmup",
        "eval.finetune.duration",
        "eval.finetune.warmup",
    ):
        amount, _ = parse_duration(name, _get(c, name))
        if amount == 0 and not name.endswith("warmup"):
            raise UserError(f"{name}={_get(c, name)!r}: must be more than 0")
    if c.eval.evals_every and parse_duration("eval.evals_every", c.eval.evals_every)[0] == 0:
        raise UserError(f"eval.evals_every={c.eval.evals_every!r}: must be more than 0")
    if not all(isinstance(e, (int, float)) and 0 <= e <= 255 for e in c.eval.robustness.epsilons):
        raise UserError(f"eval.robustness.epsilons={c.eval.robustness.epsilons!r}: numbers between 0 and 255")
    parse_profile(c.profile)
    _check_sources(c)
    crops = tuple(f"{group}.crop_{what}" for group in CROPPED for what in ("scale", "ratio"))
    for name, length in (*((crop, 2) for crop in crops), ("data.image_mean", 3), ("data.image_std", 3)):
        value = _get(c, name)
        numbers = all(isinstance(v, (int, float)) and (v > 0 or name.endswith("mean")) for v in value)
        if len(value) != length or not numbers:
            raise UserError(f"{name}={value!r}: {length} positive numbers")
    for name in crops:
        if _get(c, name)[0] > _get(c, name)[1] or (name.endswith("scale") and _get(c, name)[1] > 1):
            raise UserError(f"{name}={_get(c, name)!r}: (least, most), shares of the picture at most 1")


def _source_specs(c: ConfigDict) -> dict[str, ConfigDict]:
    """All `source_fields`, by the name of their group."""
    mixture = {f"data.mixture.{name}": spec for name, spec in c.data.mixture.items()}
    labelled = {f"eval.{part}": c.eval[part] for part in ("train", "test", "outside")}
    return {"data.train": c.data.train, "data.val": c.data.val, **mixture, **labelled}


def _check_sources(c: ConfigDict) -> None:
    for field, spec in _source_specs(c).items():
        if spec.captions not in ("draw", "all"):
            raise UserError(one_of(f"{field}.captions", spec.captions, ("draw", "all")))
        if not spec.weight > 0:
            raise UserError(f"{field}.weight={spec.weight!r}: must be more than 0")
        for modality in spec.modalities:
            if modality not in MODALITIES:
                raise UserError(one_of(f"{field}.modalities", modality, MODALITIES))
    if c.data.epoch_source and c.data.epoch_source not in c.data.mixture:
        raise UserError(one_of("data.epoch_source", c.data.epoch_source, tuple(c.data.mixture)))


_BIG = 10**12
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("seed", 0, 2**31 - 1),
    ("batch_size", 1, _BIG),
    ("data.threads", 0, 1024),
    ("data.mixture_rows", 0, _BIG),
    ("data.max_bad_fraction", 0, 1),
    ("model.width", 0, _BIG),
    ("model.depth", 0, _BIG),
    ("model.heads", 0, _BIG),
    ("model.mlp_ratio", 0.01, _BIG),
    ("model.decoder_width", 4, _BIG),
    ("model.decoder_depth", 1, _BIG),
    ("model.decoder_heads", 1, _BIG),
    ("model.output_head_depth", 0, 100),
    ("model.layer_norm_epsilon", 1e-15, 0.1),
    ("model.image_mask_ratio", 0.0, 0.95),
    ("model.text_mask_ratio", 0.0, 0.95),
    ("model.image_target_share", 0.01, 1.0),
    ("micro_batches", 1, _BIG),
    ("loss.vocabulary_blocks", 1, 10_000),
    ("mesh.data", 0, _BIG),
    ("mesh.fsdp", 0, _BIG),
    ("mesh.tensor", 0, _BIG),
    ("model.attention_head_groups", 1, _BIG),
    ("model.dropout", 0.0, 0.99),
    ("model.attention_dropout", 0.0, 0.99),
    ("model.drop_path", 0.0, 0.99),
    ("loss.image_weight", 0.0, _BIG),
    ("loss.text_weight", 0.0, _BIG),
    ("optimizer.learning_rate", 0.0, _BIG),
    ("optimizer.final_learning_rate", 0.0, _BIG),
    ("optimizer.b1", 0.0, 0.999999),
    ("optimizer.b2", 0.0, 0.999999),
    ("optimizer.weight_decay", 0.0, _BIG),
    ("optimizer.clip_norm", 0.0, _BIG),
    ("data.image_size", 1, _BIG),
    ("data.patch_size", 1, _BIG),
    ("data.max_text_tokens", 1, 100_000),
    ("data.caption_fraction", 0.0, 1.0),
    ("checkpoint.keep", 1, _BIG),
    ("eval.examples", 1, _BIG),
    ("eval.batch_size", 1, _BIG),
    ("eval.pictures", 0, 1000),
    ("eval.train_examples", 2, _BIG),
    ("eval.test_examples", 1, _BIG),
    ("eval.pairs", 2, 1_000_000),
    ("eval.scored_pairs", 0, 10_000),
    ("eval.linear_probe.batch_size", 2, _BIG),
    ("eval.linear_probe.learning_rate", 0.0, _BIG),
    ("eval.linear_probe.momentum", 0.0, 0.999999),
    ("eval.linear_probe.weight_decay", 0.0, _BIG),
    ("eval.finetune.batch_size", 2, _BIG),
    ("eval.finetune.learning_rate", 0.0, _BIG),
    ("eval.finetune.b1", 0.0, 0.999999),
    ("eval.finetune.b2", 0.0, 0.999999),
    ("eval.finetune.weight_decay", 0.0, _BIG),
    ("eval.finetune.layer_decay", 0.01, 1.0),
    ("eval.finetune.drop_path", 0.0, 0.99),
    ("eval.finetune.mixup", 0.0, 1000.0),
    ("eval.finetune.cutmix", 0.0, 1000.0),
    ("eval.finetune.cutmix_probability", 0.0, 1.0),
    ("eval.finetune.label_smoothing", 0.0, 0.99),
    ("eval.finetune.rand_augment", 0.0, 10.0),
    ("eval.attention.examples", 1, _BIG),
    ("eval.attention.pictures", 0, 100),
    ("eval.robustness.pgd_steps", 1, 10_000),
    ("eval.robustness.examples", 1, _BIG),
    ("anomaly.spike", 0.0, _BIG),
    ("anomaly.stop_after", 1, _BIG),
    ("stall.report_after", 0.0, _BIG),
    ("stall.stop_after", 0.0, _BIG),
)


def _get(config: ConfigDict, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = value[part]
    return value
