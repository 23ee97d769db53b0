r"""SIMLA on your own image-text pairs: a ViT, BERT with cross-attention above it, and five levels of alignment.

    python -m m3ae_jax.main --config=configs/simla.py --workdir=DIR --config.data.train.path=SHARDS \
        --config.data.val.path=SHARDS --config.data.tokenizer=FILE --config.simla.image_tokenizer=RUN

RUN is one of configs/visual_tokenizer.py (--config.simla.id_weight=0 leaves it out). ALBEF's recipe, 256 px, batch 512.
Hardware: by the plan (--mode=plan); neither run on TPUs nor on GPUs. Result: not measured.
"""

from ml_collections import ConfigDict

from m3ae_jax.config import default, memory_lean


def get_config() -> ConfigDict:
    """The config."""
    c = memory_lean(default("simla"))
    c.batch_size = 512
    c.duration = "30 epochs"
    c.model.activation = "gelu"
    c.simla.queue = 65_536
    c.simla.distillation_ramp = 7_800  # an epoch of 4 million pairs
    c.optimizer.learning_rate, c.optimizer.final_learning_rate = 5e-5, 5e-6  # 1e-4 and 1e-5 at a batch of 512
    c.optimizer.warmup = "2000 steps"
    c.optimizer.b2, c.optimizer.weight_decay = 0.999, 0.02
    c.data.max_text_tokens = 25
    c.data.image_mean = (0.48145466, 0.4578275, 0.40821073)
    c.data.image_std = (0.26862954, 0.26130258, 0.27577711)
    c.data.crop_scale = (0.2, 1.0)
    c.data.flip = False  # captions speak of left and right
    c.evals = ("retrieval",)
    return c
