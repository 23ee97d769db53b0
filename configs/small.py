r"""M3AE small: the paper's recipe (256 px, patch 16, 64 text tokens, batch 4096) on your own image-text pairs.

    python -m m3ae_jax.main --config=configs/small.py --workdir=DIR --config.data.train.path=SHARDS \
        --config.data.val.path=SHARDS --config.data.tokenizer=FILE.model

Encoder width / depth / heads 384 / 12 / 6, decoder 512 / 8 / 16; 75 million parameters with BERT's vocabulary.
Meant for: TPU v5e-8 or more, by the plan (docs/plans.md); neither run on TPUs nor on GPUs. Result: not measured.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default, memory_lean


def get_config() -> ConfigDict:
    """The config."""
    c = default()
    c.model.size = "small"
    return memory_lean(c, head_groups=2)
