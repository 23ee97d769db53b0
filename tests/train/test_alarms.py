"""A run warns when a metric leaves the bounds that its objective sets."""

import types

from m3ae_jax.train import loop


def test_a_metric_outside_its_bounds_is_warned_of_once_until_it_is_back(caplog):
    running = object.__new__(loop._Loop)
    objective = types.SimpleNamespace(alarms={"latent/cosine": (-1.0, 0.99)})
    running._setup, running._alarmed = types.SimpleNamespace(objective=objective), set()
    for step, cosine in enumerate((0.5, 0.995, 0.999, 0.98, float("nan"))):
        running._check_alarms(step, {"latent/cosine": cosine, "loss": 1e9})
    running._check_alarms(9, {"loss": 1.0})
    assert caplog.messages == [
        "step 1: latent/cosine is 0.995, outside -1 to 0.99 (docs/metrics.md)",
        "step 4: latent/cosine is nan, outside -1 to 0.99 (docs/metrics.md)",
    ]
    assert [record.kind for record in caplog.records] == ["alarm", "alarm"]
