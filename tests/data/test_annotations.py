"""Annotation files of the field: each layout is told by its keys, from a small file of the published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m3ae_jax.data import annotations
from m3ae_jax.data.annotations import LAYOUTS, number_of, recognise


def karpathy_image(number: int, split: str, captions: int = 5) -> dict[str, Any]:
    return {
        "filepath": "val2014",
        "sentids": list(range(captions)),
        "filename": f"COCO_val2014_{number:012d}.jpg",
        "imgid": number,
        "split": split,
        "sentences": [{"tokens": ["a"], "raw": "A cat. ", "imgid": number, "sentid": k} for k in range(captions)],
        "cocoid": number,
    }


KARPATHY = {
    "images": [karpathy_image(n, split) for n, split in enumerate(("train", "train", "restval", "val", "test"))],
    "dataset": "coco",
}
COCO = {
    "info": {},
    "licenses": [],
    "images": [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 8, "file_name": "000000000008.jpg"}],
}
VQA = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
ARO = {"image_path": "1.jpg", **dict.fromkeys(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), 9)}
ARO |= {"true_caption": "a", "false_caption": "b"}
NLVR2 = [
    {"sentence": "s", "label": "True", "identifier": f"{pair}-{k}", "left_url": "", "right_url": "", "synset": "",
     "query": "", "writer": 1, "validation": {}}
    for pair, k in (("dev-850-0", 0), ("dev-850-0", 1), ("test1-3-2", 0))
]  # fmt: skip
SNLI = {"gold_label": "neutral", "sentence1": "p", "sentence2": "h", "captionID": "12.jpg#0", "pairID": "12.jpg#0r1n"}

DOCUMENTS: list[tuple[Any, str, dict[str, int], dict[str, int], str]] = [
    (KARPATHY, "Karpathy's splits", {"images": 5, "captions": 25}, {"train": 3, "val": 1, "test": 1},
     "val2014/COCO_val2014_000000000000.jpg"),
    ({"images": [{k: v for k, v in karpathy_image(1, "train", 6).items() if k not in ("filepath", "cocoid")}],
      "dataset": "flickr30k"}, "Karpathy's splits", {"images": 1, "captions": 6}, {"train": 1},
     "COCO_val2014_000000000001.jpg"),
    ([{"image": "/data/1.jpg", "caption": "a"}, {"image": "/data/2.jpg", "caption": ["b", "c"]}],
     "ALBEF's pretraining list", {"images": 2, "captions": 3}, {}, "/data/1.jpg"),
    ([{"image": "1.jpg", "caption": "a", "image_id": "1"}, {"image": "1.jpg", "caption": "b", "image_id": "1"}],
     "ALBEF's retrieval list (training)", {"images": 1, "captions": 2}, {}, "1.jpg"),
    ([{"image": "val2014/1.jpg", "caption": ["a"] * 5}], "ALBEF's retrieval list (evaluation)",
     {"images": 1, "captions": 5}, {}, "val2014/1.jpg"),
    ([{"dataset": "vqa", "image": "1.jpg", "question": "q", "answer": ["yes"] * 10},
      {"dataset": "vg", "image": "2.jpg", "question": "q", "answer": "no"}],
     "ALBEF's VQA list (training)", {"images": 2, "questions": 2}, {"vqa": 1, "vg": 1}, "1.jpg"),
    ([{"dataset": "vqa", "image": "1.jpg", "question": "q", "question_id": 3}],
     "ALBEF's VQA list (evaluation)", {"images": 1, "questions": 1}, {"vqa": 1}, "1.jpg"),
    ([{"images": ["1.png", "2.png"], "sentence": "s", "label": "False"}], "ALBEF's NLVR list",
     {"images": 2, "sentences": 1}, {}, "1.png"),
    ([{"image": "12", "sentence": "s", "label": "entailment"}], "ALBEF's visual entailment list",
     {"images": 1, "sentences": 1}, {}, "12.jpg"),
    ([{"image": "1.jpg", "text": "the left one"}], "ALBEF's grounding list (training)",
     {"images": 1, "sentences": 1}, {}, "1.jpg"),
    ([{"image": "1.jpg", "text": "the left one", "ref_id": 4}], "ALBEF's grounding list (evaluation)",
     {"images": 1, "sentences": 1}, {}, "1.jpg"),
    ({**VQA, "questions": [{"image_id": 42, "question": "q", "question_id": k} for k in range(3)]}, "VQA v2 questions",
     {"images": 1, "questions": 3}, {"val2014": 3}, "COCO_val2014_000000000042.jpg"),
    ({**VQA, "annotations": [{"question_id": 1, "image_id": 42, "question_type": "is", "answer_type": "yes/no",
                              "multiple_choice_answer": "yes", "answers": []}]}, "VQA v2 answers",
     {"images": 1, "questions": 1}, {"val2014": 1}, "COCO_val2014_000000000042.jpg"),
    ({**COCO, "annotations": [{"id": k, "image_id": 7, "caption": "c"} for k in range(3)]}, "COCO captions",
     {"images": 2, "captions": 3}, {}, "000000000007.jpg"),
    ({**COCO, "categories": [], "annotations": [{"id": 1, "image_id": 7, "bbox": [0, 0, 1, 1], "category_id": 1,
                                                 "segmentation": [], "area": 1, "iscrowd": 0}]}, "COCO instances",
     {"images": 2, "objects": 1}, {}, "000000000007.jpg"),
    ({"0": {"filename": "1.jpg", "caption": "a", "negative_caption": "b"},
      "7": {"filename": "2.jpg", "caption": "a", "negative_caption": "b"}}, "SugarCrepe",
     {"images": 2, "caption pairs": 2}, {}, "1.jpg"),
    ([ARO | {"relation_name": "on"}], "ARO relation", {"images": 1, "caption pairs": 1}, {}, "1.jpg"),
    ([ARO | {"attributes": ["red", "big"]}], "ARO attribution", {"images": 1, "caption pairs": 1}, {}, "1.jpg"),
]  # fmt: skip
LINES: list[tuple[list[dict[str, Any]], str, dict[str, int], dict[str, int], str]] = [
    (NLVR2, "NLVR2", {"images": 4, "sentences": 3}, {"dev": 2, "test1": 1}, "dev-850-0-img0.png"),
    ([NLVR2[0] | {"identifier": "train-1-2-3", "directory": 17}], "NLVR2", {"images": 2, "sentences": 1}, {"train": 1},
     "17/train-1-2-img0.png"),
    ([SNLI | {"Flickr30K_ID": "12"}, SNLI | {"Flikr30kID": "13"}, SNLI], "SNLI-VE", {"images": 2, "sentences": 3}, {},
     "12.jpg"),
    ([{"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "a", "caption_1": "b", "tag": "Object"}],
     "Winoground", {"images": 2, "captions": 2}, {}, "ex_0_img_0"),
]  # fmt: skip


def write(path: Path, content: Any) -> Path:
    """JSON, or JSON lines of a .jsonl."""
    text = "\n".join(map(json.dumps, content)) + "\n" if path.suffix == ".jsonl" else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "layout", "counts", "splits", "picture"),
    DOCUMENTS,
    ids=[f"{i}-{d[1]}" for i, d in enumerate(DOCUMENTS)],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_item_11_a_document_is_told_by_its_keys(tmp_path, content, layout, counts, splits, picture, indent):
    path = tmp_path / "any_name.json"
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    found = recognise(path)
    assert found is not None and found.layout == layout
    assert (found.counts, found.splits, found.pictures[0]) == (counts, splits, picture)
    assert (found.unknown, found.malformed, found.whole, found.missing) == ((), 0, True, ())


@pytest.mark.parametrize(("rows", "layout", "counts", "splits", "picture"), LINES)
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_item_11_lines_are_told_by_their_keys_whatever_the_ending(
    tmp_path, rows, layout, counts, splits, picture, ending
):
    path = write(tmp_path / "any_name.jsonl", rows).rename(tmp_path / f"other{ending}")
    found = recognise(path)
    assert found is not None and found.layout == layout
    assert (found.counts, found.splits, found.pictures[0]) == (counts, splits, picture)
    assert (found.unknown, found.malformed, found.whole) == ((), 0, True)


def test_every_layout_has_its_file_here():
    assert {one.name for one in LAYOUTS} == {case[1] for case in (*DOCUMENTS, *LINES)}


def test_one_line_says_what_was_found(tmp_path):
    path = write(tmp_path / "dataset_coco.json", KARPATHY)
    assert str(recognise(path)) == (
        "dataset_coco.json looks like Karpathy's splits: 5 images, 25 captions (train 3, val 1, test 1)"
    )
    one = write(tmp_path / "one.json", [{"image": "/1.jpg", "caption": "a"}])
    assert str(recognise(one)) == "one.json looks like ALBEF's pretraining list: 1 image, 1 caption"


def test_missing_pictures_are_counted_where_a_folder_is_given(tmp_path):
    path = write(tmp_path / "dataset_coco.json", KARPATHY)
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "images" / "val2014" / f"COCO_val2014_{number:012d}.jpg").touch()
    found = recognise(path, tmp_path / "images")
    assert found is not None and found.missing == tuple(f"val2014/COCO_val2014_{n:012d}.jpg" for n in (3, 4))
    (tmp_path / "images" / "COCO_val2014_000000000003.jpg").touch()  # without the folder that the file names
    assert len(recognise(path, tmp_path / "images").missing) == 1
    lines = write(tmp_path / "examples.jsonl", LINES[3][0])
    (tmp_path / "ex_0_img_0.png").touch()
    assert recognise(lines, tmp_path).missing == ("ex_0_img_1",)


def test_item_11_pictures_are_looked_for_in_the_folders_below_too(tmp_path, monkeypatch):
    questions = {**VQA, "questions": [{"image_id": n, "question": "q", "question_id": n} for n in range(9)]}
    path = write(tmp_path / "questions.json", questions)
    assert len(recognise(path, tmp_path).missing) == 9
    (tmp_path / "val2014").mkdir()
    for number in range(2):
        (tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg").touch()
    assert recognise(path, tmp_path).missing == tuple(f"COCO_val2014_{n:012d}.jpg" for n in range(2, 9))
    monkeypatch.setattr(annotations, "_MOST_FOLDERS", 0)
    assert len(recognise(path, tmp_path).missing) == 9


def test_item_11_sentences_without_a_gold_label_are_counted_apart(tmp_path):
    rows = [SNLI, SNLI | {"gold_label": "-"}, SNLI | {"gold_label": "entailment"}]
    path = write(tmp_path / "snli_ve_dev.jsonl", rows)
    assert str(recognise(path)).endswith("SNLI-VE: 1 image, 2 sentences, 1 undecided sentence")


def test_unknown_keys_and_malformed_rows_are_told(tmp_path):
    rows = [
        {"image": "/1.jpg", "caption": "a", "url": "x"},
        {"image": "/2.jpg"},
        None,
        {"image": "/3.jpg", "caption": "c"},
    ]
    found = recognise(write(tmp_path / "a.json", rows))
    assert found is not None
    assert (found.unknown, found.malformed, found.counts) == (("url",), 2, {"images": 2, "captions": 2})
    assert "2 rows without the keys of the layout; keys that the layout does not have: url" in str(found)
    odd = {**KARPATHY, "version": 3, "images": [*KARPATHY["images"], karpathy_image(9, "val") | {"sentences": 5}]}
    found = recognise(write(tmp_path / "b.json", odd))
    assert found is not None and (found.unknown, found.malformed, found.counts["images"]) == (("version",), 1, 5)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", "[1, 2]", '{"image": 1}', '[{"image": "a"}]', '{"images": []}', '{"images": {"a": 1}}',
     '[{"image": "a", "caption": ', "\x00" * 100, "[" * 100_000, '{"caption": "one", "url": "x"}\n{"caption": "two"}',
     '{"sentence1": "a", "sentence2": "b", "gold_label": "neutral", "pairID": "1r1n"}'],
)  # fmt: skip
def test_anything_else_is_none(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    assert recognise(path) is None
    assert recognise(tmp_path / "gone.json") is None


def test_a_large_document_is_not_read_and_of_large_lines_the_first(tmp_path, monkeypatch):
    document, lines = write(tmp_path / "a.json", KARPATHY), write(tmp_path / "b.jsonl", NLVR2)
    monkeypatch.setattr(annotations, "MAX_FILE_BYTES", 400)
    monkeypatch.setattr(annotations, "_HEAD", 300)
    assert recognise(document) is None
    found = recognise(lines)
    assert found is not None and not found.whole and found.counts["sentences"] == 2
    assert str(found).endswith("only its first 400 bytes were read")


def test_item_10_a_clip_benchmark_folder_is_told_with_its_missing_shards(tmp_path):
    root = tmp_path / "wds_cars"
    for split, shards in (("train", 3), ("test", 1)):
        (root / split).mkdir(parents=True)
        (root / split / "nshards.txt").write_text(f"{shards}\n")
    for name in ("train/0.tar", "train/2.tar", "test/0.tar"):
        (root / name).touch()
    (root / "classnames.txt").write_text("car\nbus\n")
    found = recognise(root)
    assert found is not None and found.missing == ("train/1.tar",)
    assert str(found) == (
        "wds_cars looks like a CLIP_benchmark folder for classification: 4 shards, 2 class names (test 1, train 3)"
    )
    (root / "dataset_type.txt").write_text("retrieval\n")
    one = recognise(root / "test")
    assert one is not None and (one.layout, one.splits) == ("a CLIP_benchmark folder for retrieval", {"test": 1})
    assert recognise(tmp_path) is None
    (root / "test" / "nshards.txt").write_text("many")
    assert recognise(root) is None


def test_one_is_singular():
    assert [number_of(n, "captions") for n in (0, 1, 2000)] == ["0 captions", "1 caption", "2,000 captions"]
