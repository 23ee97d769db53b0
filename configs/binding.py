r"""A small MAMO, or another objective, on built-in scenes whose captions name two objects: who binds colour to shape?

    python -m m3ae_jax.main --config=configs/binding.py [--config.objective=contrastive]

The scenes have three shapes on plain backgrounds: with all of them 100,000 examples do not suffice.
Hardware: two CPU cores, 11 to 15 minutes on one of them (contrastive: 4). Result: recall@1 of three seeds among
captions and twins 0.042 after re-ranking, contrastive 0.023 (docs/binding.md, with expected losses).
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default


def get_config() -> ConfigDict:
    """The config."""
    c = default("mamo")
    c.batch_size = 32
    c.duration = "4000 steps"
    c.model.width, c.model.depth, c.model.heads = 96, 3, 3
    c.compute.unroll = True  # faster on a CPU
    c.mamo.momentum = c.mamo.momentum_start = 0.99
    c.mamo.image_mask_ratio = 0.5
    c.mamo.text_mask_ratio = 0.5  # the shape is asked for where the colour is shown, and the other way round
    c.mamo.embedding_width = 64
    c.mamo.text_depth = c.mamo.fusion_depth = 2  # the fused CLS reads in the second layer what the first has compared
    c.optimizer.learning_rate = 1.2e-2
    c.optimizer.warmup = "200 steps"
    c.optimizer.b2 = 0.98
    c.data.train.source = c.data.val.source = "scenes"
    c.data.tokenizer = "scenes"
    c.data.max_text_tokens = 16
    c.data.scenes.image_size = c.data.image_size = 32
    c.data.scenes.min_objects, c.data.scenes.max_objects = 2, 2
    c.data.scenes.shapes = ("circle", "cross", "star")
    c.data.scenes.textures = c.data.scenes.backgrounds = ("plain",)
    c.data.patch_size = 8
    c.data.image_mean, c.data.image_std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    c.data.crop_scale = c.data.crop_ratio = (1.0, 1.0)  # endless data needs no crops, and they blur
    c.data.flip = False  # captions speak of left and right
    c.log_every = "100 steps"
    c.checkpoint.every = "100_000 steps"  # at the end alone
    c.eval.every = "1000 steps"
    c.eval.examples = 512
    c.eval.pictures = 4
    c.eval.reranked = 16
    c.evals = ("binding",)
    return c
