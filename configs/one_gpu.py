r"""M3AE base on one GPU, on your own image-text pairs: 256 px, patch 16, 64 text tokens, batch 1024.

    python -m m3ae_jax.main --config=configs/one_gpu.py --workdir=DIR --config.data.train.path=SHARDS \
        --config.data.val.path=SHARDS --config.data.tokenizer=FILE.model

The batch is cut into parts (micro_batches) by the GPU's memory: about 24 examples at a time for each GiB, a power of
two. A batch in parts has the same loss and gradient, so a run goes on on a GPU of another size as the same run; without
a GPU that its driver tells of, the parts are those of 16 GiB. Another batch is another run: --config.batch_size=2048.
Meant for: one GPU from 8 GiB, by the plan (docs/plans.md); not run on a GPU yet. Result: not measured.
"""

import subprocess

from ml_collections import ConfigDict

from m3ae_jax.config import default, memory_lean

_UNKNOWN_GIB = 16.0


def get_config() -> ConfigDict:
    """The config."""
    c = memory_lean(default())
    c.batch_size = 1024
    c.micro_batches = parts(c.batch_size, memory_gib())
    c.duration = "100 epochs"
    return c


def parts(batch_size: int, gib: float) -> int:
    """Into how many parts a batch is cut: a power of two."""
    count = 1
    while batch_size % (2 * count) == 0 and batch_size / count > 24 * gib:
        count *= 2
    return count


def memory_gib() -> float:
    """The memory of the smallest GPU here, in GiB, as NVIDIA's driver tells; 16 where it tells of none."""
    command = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return min(map(int, told.split())) / 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return _UNKNOWN_GIB
