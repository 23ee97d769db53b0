"""The fields of a run as a whole, which stand in no group."""

from __future__ import annotations

from ml_collections import ConfigDict

from m3ae_jax.config.durations import parse_profile
from m3ae_jax.config.fields import FieldGroup, setting
from m3ae_jax.errors import UserError


class RunFields(FieldGroup):
    """The run: what is trained, for how long, and what is reported of it."""

    seed: int = setting(42, low=0, high=2**31 - 1)
    """Seed of parameters, order, augmentation, masks and dropout."""
    objective: str = setting("m3ae")
    """The objective: a built-in one, or an import path "package.module:Class"."""
    batch_size: int = setting(4096, low=1, aliases=("batch", "bs", "global_batch_size"))
    """Examples of a step, over all devices and processes."""
    micro_batches: int = setting(1, low=1, program=True, aliases=("accumulate", "accum_steps", "gradient_accumulation"))
    """Parts of a batch that are computed one after the other; the loss is the whole batch's."""
    duration: str = setting("100 epochs", duration=True, aliases=("epochs", "steps", "num_epochs", "num_steps"))
    """Length of the training."""
    init_from: str = setting("", identifies=False, weights=True, aliases=("init", "checkpoint_path", "pretrained"))
    """A run's folder or checkpoint whose weights the run starts from."""
    log_every: str = setting("50 steps", duration=True, identifies=False)
    """Time between log lines."""
    evals: tuple[str, ...] = setting((), identifies=False)
    """Evaluations, named as the modules of evals/, that run at the end of training, each `eval.evals_every`, and with
    `--mode=eval`."""
    profile: str = setting("", identifies=False)
    """Steps "A-B": a trace of the steps A to B, for TensorBoard."""

    @staticmethod
    def check(config: ConfigDict, path: str) -> None:
        """Refuses a batch that cannot be cut into its parts, and a wrong `profile`."""
        if config.batch_size % config.micro_batches:
            raise UserError(f"batch_size={config.batch_size} is not divisible by micro_batches={config.micro_batches}")
        parse_profile(config.profile)
