r"""CLIP on your own image-text pairs, the baseline of the other objectives: two towers of one size, batch 4096.

    python -m m3ae_jax.main --config=configs/contrastive.py --workdir=DIR --config.data.train.path=SHARDS \
        --config.data.val.path=SHARDS --config.data.tokenizer=FILE.model [--config.model.size=large]

With --config.contrastive.loss=sigmoid it is SigLIP. --config.micro_batches=N embeds a batch in N parts and compares
all of it. Hardware: by the plan (--mode=plan); neither run on TPUs nor on GPUs. Result: not measured.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default, memory_lean


def get_config() -> ConfigDict:
    """The config."""
    c = memory_lean(default("contrastive"))
    c.optimizer.learning_rate = 3e-5  # 4.8e-4 at a batch of 4096 (assumed)
    c.optimizer.warmup = "2000 steps"
    c.optimizer.b2, c.optimizer.weight_decay = 0.98, 0.2
    c.optimizer.no_decay = (*c.optimizer.no_decay, "position_embedding")
    c.data.image_size = 224
    c.data.max_text_tokens = 32
    c.data.crop_scale = (0.5, 1.0)  # captions are of whole pictures
    c.data.flip = False  # captions speak of left and right
    c.evals = ("retrieval",)
    return c
