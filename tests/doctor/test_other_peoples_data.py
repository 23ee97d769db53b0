"""The data doctor on what other people's data hold: findings named after the items of the issue."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3ae_jax import config as config_lib
from m3ae_jax.data import images
from m3ae_jax.data.sources.base import Record
from m3ae_jax.data.sources.index import UNUSABLE, IndexReport
from m3ae_jax.doctor.findings import ADVICE, FACT, PROBLEM
from m3ae_jax.doctor.inspection import inspect
from m3ae_jax.doctor.subject import subject
from m3ae_jax.errors import UserError
from m3ae_jax.report import page
from m3ae_jax.report.run import build_run

SMALL = {
    "batch_size": "8", "duration": "8 steps", "model.width": "32", "model.depth": "1", "model.heads": "2",
    "m3ae.decoder_width": "32", "m3ae.decoder_depth": "1", "m3ae.decoder_heads": "2", "data.image_size": "32",
    "data.patch_size": "8", "data.train.source": "doctors_sources:Made", "data.train.path": "train",
}  # fmt: skip
MADE: dict[str, Any] = {}
"""Records by path; of a path with `report` after it what is left out."""


class Made:
    """A source whose records a test wrote into `MADE`."""

    uses = frozenset({"caption_key"})

    def __init__(self, path: str, options: Any) -> None:
        if path not in MADE:
            raise UserError(f"data.*.path={path!r}: no such file")
        self._records: list[Record] = MADE[path]
        held = {key for record in self._records for key in record}
        self.modalities = tuple(
            name for name, key in (("image", "image"), ("text", "caption")) if key in held or "unusable" in held
        )
        self.classes = ("a", "b") if "label" in held else ()
        self.fingerprint = f"fingerprint of {path}"
        if f"{path} report" in MADE:
            self.report = MADE[f"{path} report"]

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: np.ndarray) -> list[Record]:
        return [self._records[i] for i in indices.tolist()]


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """The sources, and a batch timed instead of several seconds."""
    MADE.clear()
    monkeypatch.setitem(sys.modules, "doctors_sources", types.SimpleNamespace(Made=Made))
    monkeypatch.setattr("m3ae_jax.doctor.speed._BATCHES", 1)
    monkeypatch.setattr("m3ae_jax.doctor.speed._SECONDS", 0.0)


def load(**changes):
    config = config_lib.default()
    config_lib.apply_overrides(config, list({**SMALL, **changes}.items()))
    return config


def picture(number: int, width: int = 40, height: int = 40) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, number // 256, 99)).save(out, "PNG")
    return out.getvalue()


def pairs(count: int, first: int = 0, **more: Any) -> list[Record]:
    return [Record(image=picture(first + i), caption=f"picture number {i}".encode(), **more) for i in range(count)]


def found(report: dict[str, Any], words: str) -> dict[str, Any]:
    """The one finding with these words."""
    (one,) = [finding for finding in report["findings"] if words in finding["text"]]
    return one


def text_of(workdir: Path) -> str:
    return (workdir / "report.html").read_text(encoding="utf-8")


def test_item_11_a_few_endless_captions_do_not_raise_the_advice(tmp_path):
    ordinary = [Record(caption=b" ".join([b"word"] * (7 + i % 7))) for i in range(990)]
    MADE["train"] = ordinary + [Record(caption=b" ".join([b"page"] * 25_000)) for _ in range(10)]
    report = inspect(load(**{"data.modalities": "text"}), tmp_path)
    captions = report["together"]["captions"]
    assert captions["recommended"] == 16 and captions["endless"]["count"] == 10
    endless = found(report, "not counted in the advice")
    assert endless["level"] == ADVICE and endless["text"].startswith("10 captions of more than 256 words, e.g. train")
    assert "16 words would do for 99 % of the others" in found(report, "counted in words")["text"]
    assert "Left aside for the advice on lengths: 10 captions of more than 256 words" in text_of(tmp_path)


def test_long_captions_everywhere_are_no_outliers(tmp_path):
    MADE["train"] = [Record(caption=b" ".join([b"word"] * (300 + i))) for i in range(100)]
    captions = inspect(load(**{"data.modalities": "text"}), tmp_path)["together"]["captions"]
    assert captions["endless"]["count"] == 0 and captions["recommended"] == 400


@pytest.mark.parametrize(("small", "advised"), [(6, 16), (5, None), (0, None)])
def test_item_11_a_smaller_image_size_is_advised_where_most_pictures_are_smaller(tmp_path, small, advised):
    sizes = [(18, 25)] * small + [(40, 40)] * (10 - small)
    MADE["train"] = [Record(image=picture(i, *size), caption=b"a") for i, size in enumerate(sizes)]
    report = inspect(load(), tmp_path)
    texts = [finding["text"] for finding in report["findings"] if "are enlarged" in finding["text"]]
    if advised:
        assert texts == [
            "60 % of the pictures are smaller than data.image_size=32 pixels and are enlarged; their shorter side's "
            f"median is 18 pixels: data.image_size={advised} would do"
        ]
    else:
        assert not any("would do" in text for text in texts)


def test_item_1_an_absent_caption_is_told_apart_from_an_empty_one(tmp_path):
    MADE["train"] = pairs(40)
    MADE["train"][3] = Record(image=picture(3))
    for i in (5, 6, 7):
        MADE["train"][i]["caption"] = b" "
    report = inspect(load(), tmp_path)
    captions = report["together"]["captions"]
    assert (captions["absent"]["count"], captions["empty"]["count"], captions["count"]) == (1, 3, 39)
    absent = found(report, "have no caption")
    assert absent["level"] == ADVICE
    assert absent["text"] == (
        "2.5 % of the examples have no caption, not even an empty one, and are replaced: 2.5 % no caption, e.g. train "
        "example 3"
    )
    assert found(report, "of the captions are empty")["text"].startswith("7.7 %")
    assert report["together"]["replaced"]["count"] == 1


def test_item_1_too_many_absent_captions_are_a_problem(tmp_path):
    MADE["train"] = pairs(20)
    for record in MADE["train"][:2]:
        del record["caption"]
    absent = found(inspect(load(), tmp_path), "have no caption")
    assert absent["level"] == PROBLEM and absent["text"].endswith("data.max_bad_fraction=0.05, so training stops")


@pytest.mark.parametrize("absent", [True, False])
def test_item_1_captions_that_are_always_empty_or_absent_stop_the_training(tmp_path, absent):
    MADE["train"] = pairs(20)
    for record in MADE["train"][1:] if absent else MADE["train"]:
        record["caption"] = b""
        if absent:
            del record["caption"]
    MADE["train"][0]["caption"] = b""
    report = inspect(load(), tmp_path)
    stops = found(report, "has words")
    shares = "5.0 % an empty caption, 95 % none" if absent else "100 % an empty caption"
    assert stops["level"] == PROBLEM
    assert stops["text"] == (
        f"no example has words ({shares}), so training stops; does caption_key name the right field?"
    )


def test_what_a_source_calls_unusable_counts_as_undecodable_for_its_reason(tmp_path):
    MADE["train"] = pairs(20)
    MADE["train"][4] = Record(unusable=images.TOO_MANY_BYTES, image=b"", caption=b"a")
    report = inspect(load(), tmp_path)
    assert report["together"]["pictures"]["unusable"][images.TOO_MANY_BYTES]["count"] == 1
    assert "5.0 % too many bytes, e.g. train example 4" in found(report, "do not decode")["text"]
    assert report["together"]["captions"]["absent"]["count"] == 0
    text = [Record(caption=b"words")] * 19 + [Record(unusable=images.TOO_MANY_BYTES)]
    MADE["train"] = text
    report = inspect(load(**{"data.modalities": "text"}), tmp_path)
    assert "5.0 % too many bytes, e.g. train example 19" in found(report, "have no caption")["text"]


def test_several_reasons_that_stop_only_together_are_a_problem(tmp_path):
    MADE["train"] = pairs(50)
    for i in (0, 1):
        MADE["train"][i]["image"] = b"none"
        del MADE["train"][10 + i]["caption"]
    report = inspect(load(), tmp_path)
    assert found(report, "for all reasons together")["level"] == PROBLEM
    assert found(report, "for all reasons together")["text"].startswith("8.0 % of the examples")
    assert found(report, "do not decode")["level"] == found(report, "have no caption")["level"] == ADVICE


REPORT = IndexReport(
    shards=1,
    examples=20,
    skipped={"no caption": 3},
    samples={"no caption": "00000.tar:1.jpg", "column url": "0.parquet"},
    unused={"column url": 20},
)


def test_item_2_what_is_left_out_and_what_is_not_read_is_told(tmp_path):
    MADE.update({"train": pairs(20), "train report": REPORT})
    report = inspect(load(), tmp_path)
    left_out = found(report, "left out")
    assert left_out == {"level": PROBLEM, "text": "3 examples left out: no caption 3, e.g. 00000.tar:1.jpg"}
    assert found(report, "not read")["text"] == "there, but not read: column url 20, e.g. 0.parquet"
    text = text_of(tmp_path)
    assert "Left out when the files were opened" in text and "There, but not read:" in text
    assert "Nothing was left out" not in text


def test_item_3_files_that_may_hold_examples_are_counted_as_files(tmp_path):
    counts = {"compressed or unfinished file": 1, "folder of such files": 2, "no caption": 1}
    samples = {"compressed or unfinished file": "1.tar.gz", "folder of such files": "more", "no caption": "0.tar:1.jpg"}
    report = IndexReport(50, 20, counts, samples)
    MADE.update({"train": pairs(20), "train report": report})
    findings = inspect(load(), tmp_path)["findings"]
    assert {one["text"]: one["level"] for one in findings if "left out" in one["text"]} == {
        "1 example left out: no caption 1, e.g. 0.tar:1.jpg": ADVICE,
        "1 file that may hold examples left out: compressed or unfinished file, e.g. 1.tar.gz": ADVICE,
        "2 folders that may hold examples left out: folder of such files, e.g. more": ADVICE,
    }
    MADE["train report"] = dataclasses.replace(report, shards=1, skipped={"folder of such files": 2, UNUSABLE: 1})
    report = inspect(load(), tmp_path)
    assert found(report, "2 folders that may hold examples")["level"] == PROBLEM
    assert found(report, "at least 1 example left out: unusable file 1")["level"] == ADVICE


def test_item_2_nothing_was_left_out_is_said_where_it_is_true_of_all_sources_alone(tmp_path):
    clean = dataclasses.replace(REPORT, skipped={}, unused={}, samples={})
    val = {"data.val.source": "doctors_sources:Made", "data.val.path": "val"}
    MADE.update({"train": pairs(20), "train report": clean, "val": pairs(9, 100), "val report": clean})
    inspect(load(**val), tmp_path / "clean")
    assert "Nothing was left out" in text_of(tmp_path / "clean")
    MADE["val report"] = REPORT
    report = inspect(load(**val), tmp_path / "val")
    assert "Nothing was left out" not in text_of(tmp_path / "val")
    assert found(report, "left out")["text"].startswith("data.val: 3 examples left out")
    del MADE["val report"]
    inspect(load(**val), tmp_path / "silent")
    assert "Nothing was left out" not in text_of(tmp_path / "silent")
    assert "What was left out of data.val is not known" in text_of(tmp_path / "silent")


def test_item_9_validation_data_that_cannot_be_opened_are_a_finding(tmp_path):
    MADE["train"] = pairs(20)
    report = inspect(load(**{"data.val.source": "doctors_sources:Made", "data.val.path": "gone"}), tmp_path)
    assert found(report, "data.val: cannot be opened")["level"] == PROBLEM
    assert "no such file" in found(report, "data.val: cannot be opened")["text"]
    assert "cannot be opened" in text_of(tmp_path)
    MADE["eval"] = pairs(5)
    report = inspect(load(**{"eval.test.source": "doctors_sources:Made", "eval.test.path": "eval"}), tmp_path)
    assert "no classes" in found(report, "eval.test: cannot be opened")["text"]


def test_item_9_validation_data_of_which_nothing_decodes_are_a_problem(tmp_path):
    MADE["train"] = pairs(20)
    MADE["val"] = [Record(image=b"broken", caption=b"") for _ in range(7)]
    report = inspect(load(**{"data.val.source": "doctors_sources:Made", "data.val.path": "val"}), tmp_path)
    assert found(report, "validation stops: 100 % not a picture")["level"] == PROBLEM
    assert found(report, "so validation stops; does caption_key")["level"] == PROBLEM


@pytest.mark.parametrize(
    ("without", "level", "told"),
    [
        ((2,), ADVICE, "1 of 6 examples has no class and is left out of its evaluations, e.g. example 2"),
        ((5, 3, 1), ADVICE, "3 of 6 examples have no class and are left out of its evaluations, e.g. example 1"),
        ((0, 1, 2, 4), PROBLEM, "4 of 6 examples have no class, so its evaluations stop, e.g. example 0"),
    ],
)
def test_item_5_examples_without_a_class_are_told_of_the_labelled_data(tmp_path, without, level, told):
    MADE["train"], MADE["test"] = pairs(20), pairs(6, 100, label=1)
    for index in without:
        del MADE["test"][index]["label"]
    made = {"eval.test.source": "doctors_sources:Made", "eval.test.path": "test"}
    report = inspect(load(**made), tmp_path)
    assert found(report, "no class") == {"level": level, "text": f"eval.test: {told}"}
    assert "unlabelled" not in report["sources"]["train"]


def test_item_12_training_pictures_in_the_held_out_data_are_counted(tmp_path):
    MADE["train"], MADE["val"] = pairs(30), pairs(5, 27)
    MADE["test"] = pairs(6, 100, label=1)
    out = io.BytesIO()  # another file of the same pixels
    Image.open(io.BytesIO(MADE["val"][0]["image"])).save(out, "BMP")
    MADE["val"][0]["image"] = out.getvalue()
    made = "doctors_sources:Made"
    config = load(**{
        "data.val.source": made, "data.val.path": "val", "eval.test.source": made, "eval.test.path": "test",
    })  # fmt: skip
    report = inspect(config, tmp_path)
    common = found(report, "in data.val too")
    assert common["level"] == PROBLEM
    assert common["text"].startswith(
        "3 of 30 training pictures looked at (10.0 %) are in data.val too, as 3 of its 5 pictures, e.g. train example "
    )
    (first, *_) = report["overlap"]["data.val"]["examples"]
    assert first["index"] == first["is_index"] + 27
    assert found(report, "is among 6 pictures of eval.test")["level"] == FACT
    assert "Held-out data" in text_of(tmp_path)


def test_item_12_of_the_held_out_data_what_an_evaluation_takes_is_compared(tmp_path):
    MADE["train"], MADE["val"] = pairs(10), pairs(20, 10)
    MADE["val"][19] = MADE["train"][0]
    made = {"data.val.source": "doctors_sources:Made", "data.val.path": "val"}
    report = inspect(load(**made, **{"eval.examples": "19"}), tmp_path)
    assert report["overlap"]["data.val"]["count"] == 0
    assert report["overlap"]["data.val"]["held_out_looked_at"] == 19


def test_item_11_annotation_files_beside_the_data_are_recognised(tmp_path):
    folder = tmp_path / "coco" / "train"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(picture(1))
    (folder / "1.txt").write_text("a caption")
    rows = [{"filename": f"{n}.jpg", "split": "train", "sentences": [{"raw": "a"}] * 5} for n in (1, 2)]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))
    (folder / "0.json").write_text("{}")
    data = {"data.train.source": "folder", "data.train.path": str(folder)}
    report = inspect(load(**data), tmp_path / "run")
    assert found(report, "looks like") == {
        "level": FACT,
        "text": "dataset_coco.json looks like Karpathy's splits: 2 images, 10 captions (train 2)",
    }
    assert found(report, "not there")["text"] == "dataset_coco.json: 1 of 2 images not there, e.g. 2.jpg"


def test_item_11_no_picture_of_an_annotation_file_there_is_told_as_a_fact(tmp_path):
    (tmp_path / "1.jpg").write_bytes(picture(1))
    (tmp_path / "1.txt").write_text("a caption")
    (tmp_path / "a.json").write_text(json.dumps([{"image": f"{n}.png", "caption": "a"} for n in (7, 8)]))
    report = inspect(load(**{"data.train.source": "folder", "data.train.path": str(tmp_path)}), tmp_path / "run")
    assert found(report, "not there") == {"level": FACT, "text": "a.json: 2 of 2 images not there, e.g. 7.png"}


def test_item_11_json_files_that_are_not_looked_at_are_told(tmp_path):
    (tmp_path / "1.jpg").write_bytes(picture(1))
    (tmp_path / "1.txt").write_text("a caption")
    for number in range(22):
        (tmp_path / f"{number}.json").write_text("{}" + " " * number)
    report = inspect(load(**{"data.train.source": "folder", "data.train.path": str(tmp_path)}), tmp_path / "run")
    assert found(report, "not looked at") == {
        "level": FACT,
        "text": f"{tmp_path}: its 2 smallest JSON files are not looked at; they may be annotations",
    }


def test_item_11_an_annotation_file_in_place_of_data_is_named(tmp_path):
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": [{"filename": "1.jpg", "split": "val", "sentences": []}]}))
    with pytest.raises(UserError, match=r"dataset_coco\.json looks like Karpathy's splits: 1 image, 0 captions"):
        inspect(load(**{"data.train.source": "webdataset", "data.train.path": str(file)}), tmp_path / "run")


def test_item_11_the_section_says_when_of_what_and_with_which_tokenizer(tmp_path):
    MADE["train"] = pairs(20)
    report = inspect(load(**{"data.tokenizer": "scenes"}), tmp_path)
    text = text_of(tmp_path)
    assert f"{report['made'][:16].replace('T', ' ')} UTC" in text
    assert "fingerprint of train" in text and "doctors_sources:Made" in text and "scenes" in text
    assert report["tokenizer"]["path"] == "scenes" and report["tokenizer"]["fingerprint"]


@pytest.mark.parametrize(
    ("field", "value", "stays"),
    [
        ("seed", "7", True),
        ("data.max_text_tokens", "32", True),
        ("data.train.path", "other", False),
        ("data.train.caption_key", "title", False),
        ("data.val.path", "other", False),
        ("data.tokenizer", "other.model", False),
    ],
)
def test_item_11_the_section_goes_where_data_or_tokenizer_differ(tmp_path, field, value, stays):
    MADE["train"] = pairs(20)
    config = load(**{"data.tokenizer": "scenes"})
    inspect(config, tmp_path)
    (tmp_path / "config.json").write_text(config_lib.to_json(config), encoding="utf-8")
    build_run(tmp_path)
    assert "10-data_doctor" in text_of(tmp_path), "the same data and tokenizer"
    config_lib.apply_overrides(config, [(field, value)])
    (tmp_path / "config.json").write_text(config_lib.to_json(config), encoding="utf-8")
    build_run(tmp_path)
    assert ("10-data_doctor" in text_of(tmp_path)) == stays
    assert page.place(tmp_path, 10, "data_doctor").exists() == stays


def test_the_sources_of_a_mixture_are_its_subject():
    config = config_lib.load("configs/mixture.py")
    before = subject(json.loads(config_lib.to_json(config)))
    assert before == subject(config.to_dict())
    config.data.mixture.pairs.weight = 9.0
    assert subject(config.to_dict()) == before
    config.data.mixture.pairs.path = "elsewhere"
    assert subject(config.to_dict()) != before


@pytest.mark.parametrize("strange", [{}, {"data": []}, {"data": {"mixture": 3, "train": "x", "tokenizer": {}}}])
def test_a_strange_config_has_a_subject(strange):
    assert "sources" in subject(strange)


def test_one_example_is_singular(tmp_path):
    MADE["train"] = pairs(1)
    report = inspect(load(batch_size="1"), tmp_path)
    text = text_of(tmp_path)
    assert found(report, "the one picture decodes")
    assert "The run&#x27;s first example, " in text
    assert not re.findall(r"[^\d.,]1 (?:examples|pictures|captions|cores|pixels|batches)\b", text)
