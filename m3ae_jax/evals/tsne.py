"""Labelled examples in the plane by t-SNE of their features, as in Figure 9 of arXiv 2205.14204.

Beside those of the run's encoder stand another run's (``eval.tsne.beside``), or an untrained encoder's, of the same
examples in the same colours. Drawn are the first ten classes. How well they cluster is shown by the accuracy of the ten
nearest others, in the plane and in the features it was made of; distances are Euclidean, as t-SNE's own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import m3ae_jax.inference as inference
from m3ae_jax.checkpoint.manager import find
from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.data.run_tokenizer import of_run
from m3ae_jax.errors import UserError
from m3ae_jax.evals.base import Result, table
from m3ae_jax.evals.features import INPUTS, Encoded, encode_source, fresh_params
from m3ae_jax.evals.labelled import LabelRecorder, open_labelled
from m3ae_jax.evals.verdict import Measured, compared, sentence
from m3ae_jax.objectives.base import Params, build
from m3ae_jax.parallel.mesh import param_shardings
from m3ae_jax.report.pictures import ClassMap, class_maps
from m3ae_jax.train.setup import Setup
from m3ae_jax.train.step import TrainState

CLASSES = 10
EXAMPLES = 1000
NEIGHBORS = 10
_PERPLEXITY = 30.0  # scikit-learn's default; of few examples a third of the others, as more has no meaning
_SEED = 0
_LEAST = 5  # examples


class TsneFields(FieldGroup):
    """Maps of the features of ``eval.test``."""

    feature: str = setting(
        "image/cls", choices=tuple(f"{of}/{pooling}" for of in INPUTS for pooling in ("cls", "mean"))
    )
    """What is drawn: image, text or both, by CLS or by the mean of the other tokens."""
    beside: str = setting("")
    """Another run's folder or checkpoint, which is drawn beside; empty: the untrained encoder."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """What is drawn of one encoder.

    Attributes:
        name: in figures: ``trained``, ``untrained`` or ``beside``.
        title: for people.
        features: `[n, D] float32`.
        places: `[n, 2] float32`.
    """

    name: str
    title: str
    features: np.ndarray
    places: np.ndarray


def check_tsne(config: ConfigDict) -> None:
    """Raises `UserError` where scikit-learn, the feature's modality, or the checkpoint to stand beside is missing."""
    _tsne()
    feature = config.eval.tsne.feature
    _check_modalities(feature, "data.modalities", tuple(config.data.modalities))
    _check_modalities(feature, "eval.test", open_labelled(config, "test").modalities)
    if config.eval.tsne.beside:
        find(config.eval.tsne.beside)


def _check_modalities(feature: str, where: str, held: tuple[str, ...]) -> None:
    missing = [m for m in _modalities(feature) if m not in held]
    if missing:
        raise UserError(
            f"eval.tsne.feature={feature!r} needs {' and '.join(missing)}: {where} has {', '.join(held)} alone"
        )


def _modalities(feature: str) -> tuple[str, ...]:
    return INPUTS[feature.partition("/")[0]]


def evaluate(setup: Setup, state: TrainState) -> Result:
    """Draws examples of ``eval.test``.

    Raises:
        UserError: too few examples, or the other checkpoint cannot be used.
    """
    options = setup.config.eval.tsne
    params = {"trained": state.params}
    if not options.beside:
        params["untrained"] = fresh_params(setup)
    test = _encoded(setup.config, setup, params)
    drawn, label, classes = chosen(test.label, test.classes)
    features = {name: test.features[f"{name}/{options.feature}"] for name in params}
    titles = {"trained": f"this run, step {int(state.step)}", "untrained": "an untrained encoder"}
    if options.beside:
        features["beside"], titles["beside"] = of_other_run(setup, test)
    panels = [Panel(k, titles[k], x[drawn], plane(x[drawn])) for k, x in features.items()]
    always, rows = float(np.bincount(label).max() / len(label)), []
    scalars = {"majority": always}
    for panel in panels:
        in_map, in_features = by_neighbors(panel.places, label), by_neighbors(panel.features, label)
        scalars |= {f"{panel.name}/map": in_map, f"{panel.name}/features": in_features}
        # A folder's name may hold what would end a cell.
        rows.append([panel.title.replace("|", "/").replace("\n", " "), f"{in_map:.3f}", f"{in_features:.3f}"])
    rows.append(["majority class", f"{always:.3f}", f"{always:.3f}"])
    scalars |= {"n": float(len(label)), "classes": float(len(classes))}
    some, every = len(classes), len(test.classes)
    shown = f"the first {some} of {every} classes" if some < every else "all classes"
    title = f"t-SNE of {options.feature}: {len(label):,} test examples of {shown}"
    picture = class_maps([ClassMap(p.title, p.places, label) for p in panels], classes, title)
    heads = ("encoder", f"accuracy of {NEIGHBORS} neighbours in the map", "in the features")
    shares = [Measured.share(p.title, scalars[f"{p.name}/features"], len(label)) for p in panels]
    floor = Measured.share("the majority class", always, len(label))
    said = sentence([compared(f"{NEIGHBORS} neighbours in the features", shares[:1], [*shares[1:], floor])])
    return Result.of("tsne", scalars, table(heads, rows), said, {"maps": picture})


def _encoded(config: ConfigDict, model: Setup, params: dict[str, Params]) -> Encoded:
    """A config's ``eval.test``, by a model: of few classes only as many examples as are drawn."""
    source = LabelRecorder(open_labelled(config, "test"))
    source.modalities = _modalities(config.eval.tsne.feature)  # another run may lack the tokenizer for the others
    most = EXAMPLES if len(source.classes) <= CLASSES else config.eval.test_examples
    return encode_source(model, params, source, min(most, config.eval.test_examples))


def chosen(label: np.ndarray, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The examples that are drawn: `EXAMPLES` at most, of the first `CLASSES` classes that there are examples of.

    Args:
        label: `[n]`, of all.
        classes: their names.

    Returns:
        Their rows, their labels among the classes drawn, and the names of these.

    Raises:
        UserError: too few to draw.
    """
    drawn = np.unique(label)[:CLASSES]
    rows = np.flatnonzero(np.isin(label, drawn))[:EXAMPLES]
    if len(rows) < _LEAST:
        raise UserError(
            f"tsne: {len(rows)} examples of eval.test are too few to draw; eval.test_examples says how many"
        )
    return rows, np.searchsorted(drawn, label[rows]), tuple(classes[number] for number in drawn)


def plane(features: np.ndarray) -> np.ndarray:
    """`[n, 2] float32`: t-SNE of `[n, D]` features, the same each time.

    Raises:
        UserError: scikit-learn is missing, or the features are not finite or all alike.
    """
    if not np.isfinite(features).all() or not np.ptp(features, axis=0).any():
        raise UserError(
            "tsne: the features are not finite, or those of all examples are alike: there is nothing to draw"
        )
    tsne = _tsne()
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    perplexity = min(_PERPLEXITY, (len(features) - 1) / 3)
    # Its threads meet several times in each of 1,000 steps, and wait for each other where others have the cores.
    with threadpool_limits(1, user_api="openmp"):
        places = tsne(n_components=2, perplexity=perplexity, init="pca", random_state=_SEED).fit_transform(features)
    return np.asarray(places, np.float32)


def _tsne() -> Any:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("evals=('tsne',) needs scikit-learn: pip install -e '.[tsne]'") from None
    return TSNE


def by_neighbors(x: np.ndarray, label: np.ndarray, count: int = NEIGHBORS) -> float:
    """Accuracy of the most frequent class among each example's nearest others; of equal votes the first class.

    Args:
        x: `[n, D]`.
        label: `[n]`, from 0.
        count: of others, or all if they are fewer.
    """
    x = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    squares = np.sum(x * x, axis=1)
    distance = squares[:, None] + squares - 2 * x @ x.T
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1, kind="stable")[:, : min(count, len(x) - 1)]
    votes = np.stack([(label[near] == one).sum(axis=1) for one in range(int(label.max()) + 1)], axis=1)
    return float((votes.argmax(axis=1) == label).mean())


# --- another run -------------------------------------------------------------------------------------------


def of_other_run(setup: Setup, test: Encoded) -> tuple[np.ndarray, str]:
    """The features that the run of ``eval.tsne.beside`` has of ``eval.test``, and how to call it.

    It may have another size, patches, pictures of another size, or one modality alone.

    Raises:
        UserError: no whole checkpoint there, it lacks the feature's modality or its tokenizer, or it reads other
            pictures than this run.
    """
    options = setup.config.eval.tsne
    stored = inference.read(options.beside, objective=setup.config.objective)
    other = _other_setup(setup, stored)
    shardings = param_shardings(jax.eval_shape(other.objective.init, jax.random.key(0)), other.mesh, other.rules)
    params = jax.tree.map(jax.device_put, stored.params, shardings)
    result = _encoded(setup.config, other, {"beside": params})
    if not np.array_equal(result.label, test.label):
        raise UserError(f"eval.tsne.beside={options.beside!r}: other pictures decode for it than for this run")
    folder, step = find(options.beside)
    return result.features[f"beside/{options.feature}"], f"{folder.parent.name}, step {step}"


def _other_setup(setup: Setup, stored: inference.Stored) -> Setup:
    """This run's mesh and evaluations with another run's model."""
    config, beside = stored.config.copy_and_resolve_references(), setup.config.eval.tsne.beside
    needed = _modalities(setup.config.eval.tsne.feature)
    _check_modalities(setup.config.eval.tsne.feature, f"eval.tsne.beside={beside!r}", tuple(config.data.modalities))
    config.eval = setup.config.eval
    config.data.threads = setup.config.data.threads
    config.compute.update(attention="xla", remat="none")  # for whatever device, and no gradient
    tokenizer = None
    if "text" in needed:
        how = f"eval.tsne.beside={beside!r} needs the one that it was trained with"
        tokenizer = of_run(config.data.tokenizer, stored.run, how, stored.tokenizer)
    return dataclasses.replace(setup, config=config, tokenizer=tokenizer, objective=build(config, stored.vocabulary))
