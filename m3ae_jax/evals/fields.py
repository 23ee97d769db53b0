"""The fields of the config that evaluations share."""

from __future__ import annotations

from m3ae_jax.config.fields import FieldGroup, setting

LABELS = ("shape", "color", "color_shape", "count")


class EvalFields(FieldGroup):
    """When and on what is evaluated.

    ``eval.train`` and ``eval.test`` are labelled data of the same classes; those of ``eval.outside`` are others. Where
    no path is given and ``data.val`` is scenes, they are scenes.
    """

    every: str = setting("1 epochs", duration=True)
    """Time between evaluations of the validation data."""
    evals_every: str = setting("", duration=True)
    """Time between runs of `evals` in training; empty: at its end alone."""
    examples: int = setting(4096, low=1)
    """Examples of the validation data, the same ones each time."""
    batch_size: int = setting(256, low=1)
    """Examples of a step."""
    pictures: int = setting(8, low=0, high=1000)
    """Reconstructions that are drawn at each evaluation; 0: none."""
    label: str = setting(
        "shape", choices=LABELS, hint="these are of scenes; of other data eval.train.label_key names the class's field"
    )
    """The class of a scene: shape, color or color_shape of its largest object; count, how many objects it has."""
    train_examples: int = setting(10_000, low=2)
    """Examples of `eval.train` at most; a random choice, the same for every run."""
    test_examples: int = setting(10_000, low=1)
    """Examples of `eval.test` at most, likewise."""
    group_key: str = setting("")
    """Field or column of `eval.train`: examples with the same value, as drawings of one thing, choose the probe's
    penalty together or not at all."""
    pairs: int = setting(1000, low=2, high=1_000_000)
    """Pairs of data.val, for retrieval and masked_prediction."""
    scored_pairs: int = setting(64, low=0, high=10_000)
    """Pairs of retrieval by restored words: each picture with each caption."""
    reranked: int = setting(32, low=1)
    """Of each query of retrieval so many are looked at again by an objective that matches."""
