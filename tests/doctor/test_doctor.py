"""The data doctor: on data with known faults its figures are exactly those."""

import io
import json
import logging
import re
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from m3ae_jax import config as config_lib
from m3ae_jax.data.mixture import Member, open_mixture
from m3ae_jax.data.order import Order
from m3ae_jax.data.pipeline import View
from m3ae_jax.data.sources.base import Record
from m3ae_jax.data.text import load_tokenizer
from m3ae_jax.doctor import speed, survey
from m3ae_jax.doctor.findings import ADVICE, FACT, PROBLEM, percent
from m3ae_jax.doctor.inspection import inspect
from m3ae_jax.errors import UserError
from m3ae_jax.report.pictures import hatched

EXAMPLES = 60
HTML = "<script>alert(1)</script> & <b>bold"
HEBREW = "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd"
SMALL = {
    "batch_size": "16",
    "duration": "30 steps",
    "model.width": "32",
    "model.depth": "1",
    "model.heads": "2",
    "m3ae.decoder_width": "32",
    "m3ae.decoder_depth": "1",
    "m3ae.decoder_heads": "2",
    "data.image_size": "32",
    "data.patch_size": "8",
}


def load(file="", **changes):
    config = config_lib.load(file) if file else config_lib.default()
    config_lib.apply_overrides(config, list({**SMALL, **changes}.items()))
    return config


def encoded(width, height, colour, kind="JPEG"):
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, kind)
    return out.getvalue()


def faulty_example(i):
    """Picture and caption; a picture every 4 pixels wider, a caption of 4 words, but for the faults."""
    picture = encoded(24 + 4 * (i % 10), 40, (4 * i, 255 - 4 * i, i), "PNG" if i % 2 else "JPEG")
    caption = f"a picture numbered {i}".encode()
    special_pictures = {
        0: encoded(64, 64, "red")[:300],
        1: encoded(72, 64, "blue")[:300],
        2: b"<html>404</html>",
        3: b"",
        11: encoded(24, 40, "white", "PNG"),
        12: encoded(24, 40, "white", "PNG"),
        13: encoded(24, 40, "white", "PNG"),
        14: encoded(300, 30, "black"),
        15: encoded(20, 310, "black"),
    }
    special_captions = {
        20: b" \n",
        21: HTML.encode(),
        22: HEBREW.encode(),
        23: b"not \xff\xfe UTF-8",
        **{i: b" ".join([b"long"] * 70) for i in (30, 31, 32)},
        **dict.fromkeys(range(40, 45), b"the same words again"),
    }
    return special_pictures.get(i, picture), special_captions.get(i, caption)


def write_shard(path):
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        members = {}
        for i in range(EXAMPLES):
            members[f"{i:05d}.jpg"], members[f"{i:05d}.txt"] = faulty_example(i)
        members["lonely1.jpg"] = members["lonely2.jpg"] = encoded(8, 8, "red")
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Times a batch instead of several seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m3ae_jax.doctor.speed._BATCHES", 1)
        patch.setattr("m3ae_jax.doctor.speed._SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A run's folder after the doctor has looked at all of a shard with known faults."""
    folder = tmp_path_factory.mktemp("faulty")
    write_shard(folder / "shards" / "00000.tar")
    config = load(**{"data.train.path": str(folder / "shards")})
    report = inspect(config, folder / "run", 1000, "v5e:2x2")
    return folder / "run", report, config


def test_pictures_are_counted_exactly(faulty):
    pictures = faulty[1]["sources"]["train"]["looked_at"]["pictures"]
    assert (pictures["count"], pictures["usable"]) == (EXAMPLES, 56)
    assert {reason: bad["count"] for reason, bad in pictures["unusable"].items()} == {
        "damaged picture": 2,
        "not a picture": 1,
        "empty file": 1,
    }
    (html,) = pictures["unusable"]["not a picture"]["examples"]
    assert html == {"source": "train", "index": 2, "bytes": 16, "first_bytes": b"<html>404</h".hex(" ")}
    assert {one["index"] for one in pictures["unusable"]["damaged picture"]["examples"]} == {0, 1}
    assert pictures["repeated"] == {"count": 2, "share": 2 / EXAMPLES}
    usable = [faulty_example(i)[0] for i in range(4, EXAMPLES)]
    sizes = [Image.open(io.BytesIO(picture)).size for picture in usable]
    assert pictures["smaller_than_image_size"]["count"] == sum(min(size) < 32 for size in sizes)
    kinds = [Image.open(io.BytesIO(picture)).format for picture in usable]
    assert pictures["formats"] == {kind: kinds.count(kind) for kind in ("PNG", "JPEG")}
    assert pictures["width"]["least"] == 20 and pictures["width"]["most"] == 300
    assert pictures["height"]["median"] == 40 and pictures["height"]["most"] == 310
    for name, index in (("widest", 14), ("narrowest", 15)):
        assert pictures[name]["index"] == index
    assert (pictures["largest"]["width"], pictures["largest"]["height"]) == (300, 30)


def test_captions_are_counted_exactly(faulty):
    captions = faulty[1]["sources"]["train"]["looked_at"]["captions"]
    assert captions["unit"] == "words"
    assert captions["count"] == EXAMPLES
    assert captions["empty"] == {"count": 1, "share": 1 / EXAMPLES}
    assert captions["not_utf8"]["count"] == 1
    assert captions["repeated"]["count"] == 2 + 4
    assert [(one["count"], one["caption"][:8]) for one in captions["most_repeated"]] == [
        (5, "the same"),
        (3, "long lon"),
    ]
    assert captions["lengths"] == {"2": 1, "3": 2, "4": 53, "70": 3}
    assert captions["longest"]["tokens"] == 70
    assert {limit: cut["count"] for limit, cut in captions["cut"].items()} == {
        "16": 3, "32": 3, "48": 3, "64": 3, "96": 0, "128": 0,
    }  # fmt: skip
    assert captions["cut"]["64"]["share"] == 3 / 59
    assert captions["recommended"] == 72


def test_what_indexing_left_out_and_the_epochs_are_reported(faulty):
    source = faulty[1]["sources"]["train"]
    assert source["left_out"] == {"no caption": 2}
    assert source["left_out_e.g."] == {"no caption": "00000.tar:lonely1.jpg"}
    assert (source["examples"], source["share"], source["epochs"]) == (EXAMPLES, 1.0, 30 * 16 / EXAMPLES)
    assert faulty[1]["together"] == source["looked_at"]


def test_the_speed_is_compared_with_what_a_slice_would_take(faulty):
    speed = faulty[1]["speed"]
    assert speed["examples_per_second"] > 0 and speed["cores"] >= 1 and speed["trouble"] == ""
    (need,) = speed["needed"]
    assert (need["topology"], need["chips"]) == ("v5e:2x2", 4)
    assert need["examples_per_second"] > 1000


def test_findings_come_in_the_order_of_their_weight(faulty):
    findings = faulty[1]["findings"]
    assert [finding["level"] for finding in findings] == sorted(finding["level"] for finding in findings)
    texts = {finding["text"]: finding["level"] for finding in findings}
    (bad,) = (text for text in texts if "do not decode" in text)
    assert bad.startswith("6.7 % of the pictures") and "3.3 % damaged picture, e.g. train example" in bad
    assert "data.max_bad_fraction=0.05, so training stops" in bad and texts[bad] == PROBLEM
    assert any("2 examples left out: no caption 2, e.g. 00000.tar:lonely1.jpg" in text for text in texts)
    assert any("no tokenizer is named" in text and "cuts 5.1 %" in text for text in texts)


def test_the_page_holds_no_more_than_itself(faulty):
    workdir, report, _ = faulty
    text = (workdir / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert all(where.startswith(("data:", "#")) for where in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert text.count("<img") == 2 + 12
    assert "No tokenizer is named" in text
    assert json.loads((workdir / "report" / "data_doctor.json").read_text(encoding="utf-8")) == report


def test_a_browser_shows_the_page_without_complaint(faulty, tmp_path):
    result = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not result:
        pytest.skip("needs a browser: no chromium or google-chrome is installed")
    done = subprocess.run(
        [result[0], "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path}", "--dump-dom", f"file://{faulty[0] / 'report.html'}"],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0 and "What training sees" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


def test_with_a_tokenizer_lengths_are_tokens(faulty, tmp_path):
    config = faulty[2].copy_and_resolve_references()
    config.data.tokenizer, config.data.max_text_tokens = "scenes", 24
    captions = inspect(config, tmp_path, 1000)["together"]["captions"]
    tokenizer = load_tokenizer("scenes")
    texts = [survey.clean_caption(faulty_example(i)[1], 10_000) for i in range(EXAMPLES)]
    rows = tokenizer.encode(texts)
    lengths = [len(row) for row in rows if row]
    assert captions["unit"] == "tokens"
    assert captions["lengths"] == {str(n): lengths.count(n) for n in sorted(set(lengths))}
    assert captions["cut"]["24"]["count"] == sum(n > 24 for n in lengths)
    unknown = sum(tokenizer.pieces(row).count("<unk>") for row in rows)
    assert captions["unknown_tokens"]["count"] == unknown > 0
    assert captions["unknown_words_alone"]["count"] == sum(
        not row and bool(text) for row, text in zip(rows, texts, strict=True)
    )
    assert captions["unknown_words_alone"]["count"] >= 1, "a Hebrew caption says nothing to an English vocabulary"


def test_the_first_examples_are_those_of_the_run(faulty, tmp_path):
    config = faulty[2]
    report = inspect(config, tmp_path, 7)
    assert report["together"]["examples"] == 7
    resolved = config_lib.resolve(config)
    mixture = open_mixture(resolved, 1)
    (view,) = mixture.feed(mixture.parts[0], resolved).views
    indices = np.asarray(view.order.index(np.arange(7)))
    sample = survey.look(mixture.members[0], view, 7, survey.Words(), resolved)
    assert [picture.place.index for picture in sample.pictures] == indices.tolist()


def test_the_built_in_scenes_are_healthy(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "m3ae_jax"):
        report = inspect(load("configs/tiny.py"), tmp_path, 40)
    assert "data doctor's page" in caplog.text
    assert all(finding["level"] != PROBLEM for finding in report["findings"])
    assert report["together"]["pictures"]["usable"] == 40
    assert report["together"]["captions"]["unknown_tokens"]["count"] == 0
    assert not report["sources"]["train"]["counted_at_indexing"]


def test_text_alone_shows_no_pictures(tmp_path):
    config = load("configs/tiny.py", **{"data.modalities": "text", "evals": ""})
    report = inspect(config, tmp_path, 20)
    assert "pictures" not in report["together"] and report["together"]["captions"]["count"] == 20
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<img") == 1 and "<mark>" in text


def test_a_mixture_is_reported_by_source_and_together(tmp_path):
    config = load("configs/mixture.py", batch_size="64")
    report = inspect(config, tmp_path, 40)
    looked = {name: source["looked_at"] for name, source in report["sources"].items()}
    assert {name: result["examples"] for name, result in looked.items()} == {"pairs": 20, "pictures": 10, "texts": 10}
    assert "pictures" not in looked["texts"] and "captions" not in looked["pictures"]
    assert report["together"]["pictures"]["count"] == report["together"]["captions"]["count"] == 30
    assert {name: source["share"] for name, source in report["sources"].items()} == {
        "pairs": 0.5,
        "pictures": 0.25,
        "texts": 0.25,
    }
    assert report["speed"]["examples_per_second"] > 0
    assert any(finding["text"].startswith("pairs: ") for finding in report["findings"])


def test_nothing_usable_at_all_is_reported_not_raised(tmp_path):
    shard = tmp_path / "shards" / "0.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        for i in range(20):
            for suffix, content in (("jpg", b"\xff\xd8\xff broken"), ("txt", b"")):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    report = inspect(load(**{"data.train.path": str(shard)}), tmp_path / "run", 50)
    assert report["together"]["pictures"]["unusable_share"] == 1.0
    assert report["together"]["captions"]["empty"]["count"] == 20
    levels = {finding["text"][:5]: finding["level"] for finding in report["findings"]}
    assert levels["100 %"] == PROBLEM
    assert "not one of its 8 candidates decodes" in (tmp_path / "run" / "report.html").read_text()


def test_pictures_alone_where_text_is_asked_for_is_reported(tmp_path):
    for i in range(20):
        (tmp_path / "data" / "kind").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "kind" / f"{i}.png").write_bytes(encoded(40, 40, (i, i, i), "PNG"))
    config = load(**{"data.train.path": str(tmp_path / "data"), "data.train.source": "class_folders"})
    report = inspect(config, tmp_path / "run", 50)
    assert report["findings"][0]["level"] == PROBLEM
    assert any("asks for text, which train does not hold" in trouble for trouble in report["troubles"])
    assert report["together"]["pictures"]["usable"] == 20


def test_hidden_words_are_distinguished_from_visible_ones(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nred\ncar\n##s\n")
    side = {"position": np.array([0, 2, 0]), "valid": np.array([True, True, False]), "value": np.array([2, 4, 0])}
    hidden = {"position": np.array([1]), "valid": np.array([True]), "value": np.array([3])}
    words = speed._words({"visible": side, "target": hidden}, load_tokenizer(str(tmp_path / "vocab.txt")))
    assert [(word.text, word.hidden) for word in words] == [(" red", False), (" car", True), ("s", False)]


def test_a_hidden_patch_is_hatched_and_a_visible_one_is_not():
    config = load()
    patches = np.full((16, 8 * 8 * 3), 200, np.uint8)
    visible = {"position": np.arange(15), "valid": np.ones(15, bool), "value": patches[:15]}
    target = {"position": np.array([15]), "valid": np.ones(1, bool), "value": patches[15:]}
    picture = speed._veiled({"visible": visible, "target": target}, config)
    assert picture.shape == (224, 224, 3)
    assert (picture[:168] == 200).all() and (picture[:, :168] == 200).all()
    inside = (slice(170, 222),) * 2
    assert (picture[inside] == (200 * 0.35 + hatched(224, 224, 56)[inside] * 0.65).astype(np.uint8)).all()
    assert np.ptp(picture[inside]) > 50, "no even grey, which a picture's own background may have"
    assert (picture[168, 168:] == 96).all() and (picture[168:, 223] == 96).all()


class Moody:
    """A source of a user's own: some of its examples cannot be read, and one is no picture at all."""

    modalities = ("image", "text")
    fingerprint = "moody"
    classes = ()

    def __len__(self):
        return 10

    def read(self, indices):
        if 3 in indices:
            raise OSError("disk on fire")
        if 4 in indices:
            raise KeyError("caption")
        return [Record(image=None, caption="text") if i == 5 else Record(image=b"x", caption=b"y") for i in indices]


def test_what_a_source_raises_is_reported_with_its_example():
    view = View(Order(10, 1), 1, augment=True)
    sample = survey.look(Member("own", Moody(), ("image", "text"), 1.0), view, 10, survey.Words(), load())
    assert {(place.index, why) for place, why in sample.unreadable} == {
        (3, "OSError: disk on fire"),
        (4, "KeyError: 'caption'"),
    }
    assert len(sample.pictures) == len(sample.captions) == 8
    statistics = survey.statistics(sample, load(), "words")
    assert statistics["unreadable"]["count"] == 2
    assert statistics["pictures"]["unusable"]["empty file"]["count"] == 1
    assert statistics["captions"]["lengths"] == {"1": 8}


@pytest.mark.parametrize(
    ("lengths", "budget"),
    [([1], 8), ([8], 8), ([9], 16), ([4] * 99 + [500], 8), ([4] * 98 + [20, 500], 24), ([17] * 2000, 24),
     ([8] * 1980 + [9] * 20, 8), ([8] * 1979 + [9] * 21, 16)],
)  # fmt: skip
def test_the_recommended_budget_keeps_99_percent_whole(lengths, budget):
    assert survey.recommended_budget(np.array(lengths)) == budget
    assert np.mean(np.array(lengths) <= budget) >= 0.99
    assert budget == 8 or np.mean(np.array(lengths) <= budget - 8) < 0.99


def test_a_small_source_is_passed_once(tmp_path):
    write_shard(tmp_path / "shards" / "0.tar")
    config = config_lib.resolve(load(**{"data.train.path": str(tmp_path / "shards")}))
    mixture = open_mixture(config, 1)
    assert survey.draws(mixture, 10) == [10] and survey.draws(mixture, 10_000) == [EXAMPLES]


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (0.00004, "0.004 %"), (0.003, "0.3 %"), (0.051, "5.1 %"), (0.456, "46 %"), (1, "100 %")],
)
def test_shares_are_in_percent(share, text):
    assert percent(share) == text


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match="inspect_examples"):
        inspect(load("configs/tiny.py"), tmp_path, 0)
    with pytest.raises(UserError, match="topology"):
        inspect(load("configs/tiny.py"), tmp_path, 5, "v9:1x1")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        inspect(load("configs/tiny.py"), tmp_path / "file", 5)
    assert ADVICE < FACT
