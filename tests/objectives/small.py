"""Small runs of any objective on scenes, for tests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import pytest

import m3ae_jax.config as config_lib
from m3ae_jax.parallel.mesh import make_mesh
from m3ae_jax.train import setup as setups
from m3ae_jax.train.setup import Setup, prepare

B = 8


def config_of(objective: str, **changes: Any) -> Any:
    config = config_lib.default(objective)
    config.batch_size, config.duration, config.optimizer.warmup = B, "8 steps", "0 steps"
    config.optimizer.learning_rate = 0.02
    config.data.update(image_size=32, patch_size=8, max_text_tokens=16, tokenizer="scenes", flip=False)
    config.data.scenes.update(image_size=32)
    config.data.train.source = config.data.val.source = "scenes"
    config.model.update(width=32, depth=1, heads=2)
    config.compute.unroll = True
    config_lib.apply_overrides(config, [(field, str(value)) for field, value in changes.items()])
    return config_lib.resolve(config)


@functools.cache
def setup_of(objective: str, **changes: Any) -> Setup:
    """Of a config as above, on one device."""
    return one_device(config_of(objective, **changes))


def one_device(config: Any) -> Setup:
    """Of a resolved config."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setups, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        return prepare(config)


@functools.cache
def state_of(objective: str, **changes: Any) -> Any:
    """Fresh."""
    return setup_of(objective, **changes).init_state()


def batch_of(setup: Setup) -> Any:
    """The first batch."""
    stream = setup.train_batches(0)
    batch = next(stream)
    stream.close()
    return batch


def part_of(setup: Setup) -> Any:
    """Its only part."""
    (part,) = batch_of(setup).values()
    return part
