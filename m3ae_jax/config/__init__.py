"""The configuration: every field with its default, its checks, and how it is set and saved.

A config file (``configs/*.py``) starts from `default` and changes fields; the command line changes more
(``--config.m3ae.text_mask_ratio=0.9``); `resolve` then checks everything and fills in what follows. A field is declared
once, beside the code that reads it (`fields.setting`); ``docs/config.md`` lists them all.
"""

from m3ae_jax.config.checks import resolve
from m3ae_jax.config.durations import DURATION_UNITS, parse_duration, parse_profile, steps
from m3ae_jax.config.files import allowing_named_code, check_named_code, from_json, load, to_json
from m3ae_jax.config.overrides import apply_overrides, split_overrides
from m3ae_jax.config.schema import default, difference, fields, identifies, memory_lean, same_objective, source_fields
