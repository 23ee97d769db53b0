r"""MAE huge: the image-only twin of ``huge.py``, for pictures whose captions are left aside.

    python -m m3ae_jax.main --config=configs/mae_huge.py --workdir=DIR --config.data.train.path=SHARDS \
        --config.data.val.path=SHARDS

Encoder width / depth / heads 1280 / 32 / 16, decoder 512 / 8 / 16; 657 million parameters.
Meant for: TPU v5e-8 or more, by the plan (docs/plans.md); neither run on TPUs nor on GPUs. Result: not measured.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default, image_only, memory_lean


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.model.size = "huge"
    return image_only(memory_lean(c))
