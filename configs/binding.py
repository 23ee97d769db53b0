r"""A small MAMO, or another objective, on built-in scenes whose captions name two objects: who binds colour to shape?

    python -m m3ae_jax.main --config=configs/binding.py [--config.objective=contrastive]

Hardware: two CPU cores, 40 minutes on one of them. Result: not measured. A pilot after 1,250 of the 5,000 steps (one
seed, 2026-11-30): recall@1 among captions and twins 0.053 by embedding and 0.048 re-ranked (untrained 0.000), a caption
above its twin 0.547 of the time (chance 0.5): binding is not learnt by then.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default("mamo")
    c.batch_size = 64
    c.duration = "5000 steps"  # as scenes.py shows, shapes are read off pictures after 100,000 to 300,000 examples
    c.model.width, c.model.depth, c.model.heads = 96, 2, 3
    c.compute.unroll = True  # faster on a CPU
    c.mamo.momentum = c.mamo.momentum_start = 0.99
    c.mamo.image_mask_ratio = 0.5
    c.mamo.embedding_width = 64
    c.mamo.text_depth = c.mamo.fusion_depth = 2  # the fused CLS reads in the second layer what the first has compared
    c.optimizer.learning_rate = 4e-3
    c.optimizer.warmup = "200 steps"
    c.optimizer.b2 = 0.98
    c.data.train.source = c.data.val.source = "scenes"
    c.data.tokenizer = "scenes"
    c.data.max_text_tokens = 16
    c.data.scenes.image_size = c.data.image_size = 48
    c.data.scenes.min_objects, c.data.scenes.max_objects = 2, 2
    c.data.patch_size = 12
    c.data.image_mean, c.data.image_std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    c.data.crop_scale = c.data.crop_ratio = (1.0, 1.0)  # endless data needs no crops, and they blur
    c.data.flip = False  # captions speak of left and right
    c.log_every = "100 steps"
    c.checkpoint.every = "100_000 steps"  # at the end alone
    c.eval.every = "500 steps"
    c.eval.examples = 512
    c.eval.pictures = 4
    c.eval.reranked = 16
    c.evals = ("binding",)
    return c
