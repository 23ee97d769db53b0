r"""MAMO on your own image-text pairs: a picture's tower, a caption's, a fusion, and a momentum teacher of the three.

    python -m m3ae_jax.main --config=configs/mamo.py --workdir=DIR --config.data.train.path=SHARDS \
        --config.data.val.path=SHARDS --config.data.tokenizer=FILE.model [--config.model.size=large]

ALBEF's recipe (256 px, batch 512, AdamW at 1e-4), as the paper does not give its own: what is assumed stands in
docs/config.md. Layers 12 + 6 + 6 at the base size. Hardware: by the plan (--mode=plan); neither run on TPUs nor on
GPUs. Result: not measured at this size; on the built-in scenes: configs/binding.py.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default, memory_lean


def get_config() -> ConfigDict:
    """The config."""
    c = memory_lean(default("mamo"))
    c.batch_size = 512
    c.duration = "40 epochs"
    c.optimizer.learning_rate, c.optimizer.final_learning_rate = 5e-5, 5e-6  # 1e-4 and 1e-5 at a batch of 512
    c.optimizer.warmup = "2000 steps"
    c.optimizer.b2, c.optimizer.weight_decay = 0.999, 0.02
    c.data.max_text_tokens = 30
    c.data.image_mean = (0.48145466, 0.4578275, 0.40821073)
    c.data.image_std = (0.26862954, 0.26130258, 0.27577711)
    c.data.flip = False  # captions speak of left and right
    c.evals = ("retrieval", "masked_prediction")
    return c
