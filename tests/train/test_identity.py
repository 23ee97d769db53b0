"""Every field of the config is known to identify a run or to be free; what changed is refused by name."""

import pytest

from m3ae_jax import config as config_lib
from m3ae_jax.config.schema import identifies
from m3ae_jax.errors import UserError
from m3ae_jax.train.identity import Identity


def config(**changes):
    c = config_lib.default()
    config_lib.apply_overrides(c, [(name, str(value)) for name, value in changes.items()])
    return config_lib.resolve(c)


OTHERS = {"state_version": 2, "order_version": 2, "train_data": "abc", "tokenizer": "def"}


def identity(allowed=(), others=OTHERS, **changes):
    return Identity(config(**changes), others, allowed)


def meta(**changes):
    return {**OTHERS, "config": config(**changes).to_dict()}


def test_every_field_says_whether_it_identifies_a_run():
    c = config_lib.default()
    c.data.mixture = {"pairs": config_lib.source_fields()}
    for name in config_lib.fields(c):
        assert isinstance(identifies(name), bool), name
    assert not identifies("data.mixture.pairs.path") and identifies("data.mixture.pairs.weight")
    with pytest.raises(LookupError, match=r"new\.field"):
        identifies("new.field")


def test_free_fields_may_change():
    assert identity(log_every="3 steps", **{"compute.remat": "full", "data.train.path": "x"}).check("run", meta()) == []


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("seed", 1, r"seed=1 \(the run has 42\)"),
        ("m3ae.text_mask_ratio", 0.9, r"m3ae\.text_mask_ratio=0\.9 \(the run has 0\.75\)"),
        ("duration", "7 steps", r"duration='7 steps' \(the run has '100 epochs'\)"),
    ],
)
def test_an_identifying_field_is_refused_by_name_unless_it_is_allowed(field, value, told):
    with pytest.raises(UserError, match=told) as refusal:
        identity(**{field: value}).check("run", meta())
    assert f"--allow_config_change={field}" in str(refusal.value) and "\n" not in str(refusal.value)
    (line,) = identity((field,), **{field: value}).check("run", meta())
    assert line.startswith(field)


def test_one_allowed_does_not_allow_another():
    with pytest.raises(UserError, match=r"batch_size=8 .*--allow_config_change=batch_size$"):
        identity(("seed",), seed=1, batch_size=8).check("run", meta())


def test_data_and_tokenizer_are_compared_where_they_are_stored():
    other = {**OTHERS, "train_data": "xyz"}
    with pytest.raises(UserError, match=r"train_data='xyz' \(the run has 'abc'\)"):
        identity(others=other).check("run", meta())
    assert identity(others=other).check("run", {"config": config().to_dict()}) == []  # config.json alone
    assert len(identity(("train_data",), others=other).check("run", meta())) == 1


def test_another_state_is_never_allowed():
    with pytest.raises(UserError, match=r"state_version=2 \(the run has None\)") as refusal:
        identity(("state_version",)).check("run", {"config": config().to_dict(), "order_version": 2})
    assert "init_from" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "near"), [("sede", "seed"), ("optimizer.lr", "optimizer."), ("traindata", "train_data")]
)
def test_a_name_that_is_none_is_refused_with_the_nearest(name, near):
    with pytest.raises(UserError, match=rf"--allow_config_change={name}: no such field; did you mean {near}"):
        identity((name,)).check_allowed()


def test_names_of_free_fields_are_no_mistake():
    identity(("seed", "log_every", "train_data")).check_allowed()
