r"""MAE: pictures alone, for those whose captions are left aside; the size is a field.

    python -m m3ae_jax.main --config=configs/mae.py --workdir=DIR --config.model.size=huge \
        --config.data.train.path=SHARDS --config.data.val.path=SHARDS

By default base: encoder width / depth / heads 768 / 12 / 12, decoder 512 / 8 / 16; 112 million parameters. Of small,
whose heads are six, add --config.compute.attention_head_groups=2.
Meant for: TPU v5e-8 or more, by the plan (docs/plans.md); neither run on TPUs nor on GPUs. Result: not measured.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default, memory_lean


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.data.modalities = ("image",)
    c.m3ae.use_type_embedding = False  # as the reference trains it
    return memory_lean(c)
