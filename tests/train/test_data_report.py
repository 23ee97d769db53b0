"""What a run says of its data: told at every start, and a modality that is never there stops it."""

import io
import json
import tarfile

import pytest
from PIL import Image

from m3ae_jax.errors import UserError
from m3ae_jax.evals.run import train_and_evaluate
from m3ae_jax.metrics.writers import read_lines
from tests.train.test_loop import one_device, shrunk  # noqa: F401  # the fixture

pytestmark = pytest.mark.slow


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (number * 6, 255 - number * 6, number * 3)).save(file, "PNG")
    return file.getvalue()


def shard(path, examples):
    """A tar of `{name: bytes}` members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in examples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path.parent)


def pairs(captions, fields=None):
    examples = {}
    for number, caption in enumerate(captions):
        examples[f"{number}.png"] = png(number)
        if fields is not None:
            examples[f"{number}.json"] = json.dumps(fields(number)).encode()
        elif caption is not None:
            examples[f"{number}.txt"] = caption
    return examples


def config_of(train, val="", **changes):
    sources = {"data.train.source": "webdataset", "data.train.path": train}
    if val:
        sources |= {"data.val.source": "webdataset", "data.val.path": val}
    return shrunk(**{"eval.every": "2 steps", "eval.pictures": 0, **sources, **changes})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def told(workdir, kind):
    return [event["text"] for event in read_lines(workdir / "events.jsonl") if event["kind"] == kind]


def test_item_3_every_start_tells_what_was_left_out_in_log_events_and_on_the_page(tmp_path):
    examples = pairs([b"a red circle"] * 20) | {"lonely.txt": b"a red circle", "note.xyz": b"?"}
    train = shard(tmp_path / "train" / "0.tar", examples)
    for duration in ("2 steps", "4 steps"):
        config = config_of(train, train, duration=duration)
        train_and_evaluate(config, tmp_path / "run", ("duration",))
    lines = told(tmp_path / "run", "data")
    assert [line.partition(":")[0] for line in lines] == ["data.train", "data.val"] * 2
    assert all("20 examples of 1 files; not read: member .xyz 1" in line for line in lines)
    assert all("left out: no image 1 (e.g. 0.tar:lonely.txt)" in line for line in lines)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "lonely.txt" in page and "member .xyz" in page and "Left out when the data were opened" in page


def test_item_1_a_caption_key_in_capitals_is_found(tmp_path):
    fields = pairs([b""] * 20, lambda i: {"TEXT": f"red {i}", "text": f"a red circle {i}"})
    train = shard(tmp_path / "train" / "0.tar", fields)
    train_and_evaluate(config_of(train), tmp_path / "run")
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(row["train/text_loss"] > 0 for row in rows if "train/text_loss" in row)


def test_item_1_a_mistyped_caption_key_stops_before_the_run(tmp_path):
    train = shard(tmp_path / "train" / "0.tar", pairs([b""] * 20, lambda i: {"text": f"a red circle {i}"}))
    with pytest.raises(UserError, match=r"caption_key='txet'.*did you mean 'text'"):
        train_and_evaluate(config_of(train, **{"data.train.caption_key": "txet"}), tmp_path / "run")


def test_item_1_empty_captions_stop_the_run_at_its_first_log(tmp_path):
    train = shard(tmp_path / "train" / "0.tar", pairs([b""] * 40))
    with pytest.raises(UserError, match=r"data\.train: \d+ of \d+ captions are empty"):
        train_and_evaluate(config_of(train, batch_size=32), tmp_path / "run")


def test_item_1_empty_captions_of_the_validation_data_stop_it_too(tmp_path):
    train = shard(tmp_path / "train" / "0.tar", pairs([b"a red circle"] * 20))
    val = shard(tmp_path / "val" / "0.tar", pairs([b""] * 20))
    with pytest.raises(UserError, match=r"data\.val: 16 of 16 captions are empty"):
        train_and_evaluate(config_of(train, val), tmp_path / "run")


def test_item_9_validation_that_decodes_nothing_is_refused(tmp_path):
    train = shard(tmp_path / "train" / "0.tar", pairs([b"a red circle"] * 20))
    broken = {name: data[:50] if name.endswith("png") else data for name, data in pairs([b"a red circle"] * 20).items()}
    val = shard(tmp_path / "val" / "0.tar", broken)
    with pytest.raises(UserError, match=r"data\.val: not one of the last 16 draws gave an example that can be used"):
        train_and_evaluate(config_of(train, val), tmp_path / "run")


def test_item_9_replaced_validation_examples_are_counted_and_told_once(tmp_path):
    train = shard(tmp_path / "train" / "0.tar", pairs([b"a red circle"] * 20))
    examples = pairs([b"a red circle"] * 20)
    examples["3.png"] = b""
    val = shard(tmp_path / "val" / "0.tar", examples)
    train_and_evaluate(config_of(train, val), tmp_path / "run")
    rows = [row for row in read_lines(tmp_path / "run" / "metrics.jsonl") if "val/loss" in row]
    assert [row["val/replaced_examples"] for row in rows] == [1.0] * len(rows) and len(rows) == 2
    warned = told(tmp_path / "run", "warning")
    assert sum("1 of 16 examples of data.val were replaced" in line for line in warned) == 1
    assert "empty file" in (tmp_path / "run" / "report.html").read_text()


def test_a_share_without_captions_is_what_the_config_asks_for(tmp_path):
    train = shard(tmp_path / "train" / "0.tar", pairs([b"a red circle"] * 20))
    train_and_evaluate(config_of(train, **{"data.caption_fraction": 0.0}), tmp_path / "run")
