"""The pictures for a person: sizes, wrapping, colours, and that nothing is cut off."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from m3ae_jax.report import pictures
from m3ae_jax.report.pictures import (
    Attended,
    ClassMap,
    Reconstruction,
    Word,
    attention_sheet,
    class_maps,
    curves,
    ratio_sheet,
    reconstruction_sheet,
)

GREEN, RED, YELLOW = ((200, 239, 207), (255, 214, 210), (255, 240, 176))
CAPTION = (Word(" a", False, None), Word(" red", True, " red"), Word(" square", True, " circle"))


def picture(height: int = 64, width: int = 64, value: int = 90) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def example(*words: Word, side: int = 64) -> Reconstruction:
    return Reconstruction(picture(side, side, 10), picture(side, side, 20), picture(side, side, 30), words)


def text_only(*words: Word) -> Reconstruction:
    return Reconstruction(None, None, None, words)


def has_colour(sheet: Image.Image, colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(sheet) == colour).all(-1).any())


def border_is_white(sheet: Image.Image) -> bool:
    pixels = np.asarray(sheet)
    edges = (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:])
    return all((edge == 255).all() for edge in edges)


@pytest.mark.parametrize(("side", "shown"), [(32, 192), (64, 192), (100, 192), (224, 224), (512, 256)])
def test_pictures_stand_side_by_side_at_a_legible_size(side: int, shown: int) -> None:
    pixels = np.asarray(reconstruction_sheet([example(side=side)], "t"))
    lefts = []
    for value in (10, 20, 30):
        ys, xs = np.nonzero((pixels == value).all(-1))
        assert (np.ptp(ys) + 1, np.ptp(xs) + 1) == (shown, shown)
        lefts.append(xs.min())
    assert lefts == sorted(lefts)


def test_a_column_that_no_example_has_is_left_out() -> None:
    whole, everything_hidden = example(side=32), Reconstruction(picture(32, 32), None, picture(32, 32), ())
    widths = [reconstruction_sheet([row], "t").width for row in (whole, everything_hidden)]
    assert widths[1] < widths[0] == reconstruction_sheet([whole, everything_hidden], "t").width


def test_aspect_ratio_stays() -> None:
    row = Reconstruction(picture(32, 64), None, None, ())
    ys, xs = np.nonzero((np.asarray(reconstruction_sheet([row], "t")) == 90).all(-1))
    assert (np.ptp(ys) + 1, np.ptp(xs) + 1) == (96, 192)


def test_hidden_words_are_coloured_by_the_guess() -> None:
    sheet = reconstruction_sheet([example(*CAPTION)], "t")
    assert has_colour(sheet, GREEN) and has_colour(sheet, RED) and not has_colour(sheet, YELLOW)
    assert has_colour(reconstruction_sheet([text_only(Word(" a", True, None))], "t"), YELLOW)
    visible = reconstruction_sheet([text_only(CAPTION[0])], "t")
    assert not any(has_colour(visible, colour) for colour in (GREEN, RED, YELLOW))


@pytest.mark.parametrize(
    ("text", "predicted", "shown"),
    [
        (" red", " blue", "red→blue"),
        (" dog", "dog", "▁dog→dog"),
        (" ", " x", "▁→x"),
        ("s", "", "s→▁"),
        (" red", " red", "red"),
    ],
)
def test_what_a_guess_reads(text: str, predicted: str, shown: str) -> None:
    assert pictures._word_chip(Word(text, True, predicted)).text == shown


def test_columns_that_no_example_has_are_left_out() -> None:
    both = reconstruction_sheet([example(*CAPTION)], "t").width
    assert reconstruction_sheet([example()], "t").width < both
    mixed = reconstruction_sheet([example(), text_only(*CAPTION)], "t")
    assert mixed.width == both
    assert border_is_white(mixed)


def test_long_captions_wrap_and_make_the_row_higher() -> None:
    words = tuple(Word(f" word{i}", i % 2 == 0, f" word{i % 3}") for i in range(300))
    short, long = (reconstruction_sheet([example(*w)], "t") for w in (CAPTION, words))
    assert long.width == short.width and long.height > 2 * short.height
    assert border_is_white(long)


def test_a_line_never_exceeds_its_width_and_keeps_every_character() -> None:
    font = pictures._font(16)
    chips = [pictures._Chip("ab", pictures._RIGHT), pictures._Chip("x" * 500, pictures._WRONG)]
    chips += [pictures._Chip("piece", pictures._PLAIN, starts_word=i % 7 == 0) for i in range(90)]
    flow = pictures._flow(chips, font, 200)
    assert all(x + font.getlength(chip.text) <= 200 for x, _, chip in flow.placed)
    assert "".join(c.text for _, _, c in flow.placed) == "".join(c.text for c in chips)
    assert flow.height > max(y for _, y, _ in flow.placed)


def test_no_example_and_long_title() -> None:
    assert border_is_white(reconstruction_sheet([], "nothing"))
    long = reconstruction_sheet([example()], "a very long title " * 20)
    assert long.width == reconstruction_sheet([example()], "t").width
    assert border_is_white(long)


RATIOS = (0.25, 0.5, 0.75, 0.9)


def test_ratios_stand_side_by_side() -> None:
    sheet = ratio_sheet([dict.fromkeys(RATIOS, example(*CAPTION))] * 2, "t")
    pixels = np.asarray(sheet)
    assert sheet.width == 1024 and border_is_white(sheet) and has_colour(sheet, GREEN) and has_colour(sheet, RED)
    lefts = {}
    for value, count in ((10, 2), (20, 8), (30, 8)):  # one original an example, four masked, four restored
        of_value = (pixels == value).all(-1)  # and some at the edges of letters
        assert of_value.sum() == pytest.approx(count * 192**2, rel=0.01)
        lefts[value] = np.flatnonzero(of_value.sum(axis=0) >= 384).tolist()
    assert lefts[20] == lefts[30] and len(lefts[20]) == 4 * len(lefts[10]) and max(lefts[10]) < min(lefts[20])
    words = tuple(Word(f" word{i}", i % 2 == 0, f" word{i % 3}") for i in range(60))
    assert border_is_white(ratio_sheet([dict.fromkeys(RATIOS, text_only(*words))], "long " * 100))
    assert border_is_white(ratio_sheet([], "nothing"))


def attended(words: tuple[str, ...], grid: tuple[int, int] = (3, 3)) -> Attended:
    patches = np.linspace(0, 1, grid[0] * grid[1])
    to_words = np.linspace(1, 2, len(words)) / np.linspace(1, 2, len(words)).sum()
    return Attended(picture(), grid, words, 4, to_words, {0: patches / patches.sum()})


def test_attention_is_coloured_from_nothing_to_the_largest_share() -> None:
    sheet = attention_sheet([attended(("a", "red", "square"))], "t", "how to read it")
    assert border_is_white(sheet)
    pale, dark = (255, 255, 204), (128, 0, 38)
    assert has_colour(sheet, pale) and has_colour(sheet, dark), "the scale, and the word looked at most"
    sheets = [
        attention_sheet([attended(words, (16, 16))] * 2, "title " * 50, "note " * 100)
        for words in (("x",), ("a" * 300, "猫", *map(str, range(200))))
    ]
    assert sheets[0].width == sheets[1].width and all(map(border_is_white, sheets))


@pytest.mark.parametrize("count", [2, 10])
def test_maps_share_their_colours_and_any_class_name_is_shown(count: int) -> None:
    names = ("_private", "$5 and $6", "猫\n", *["a very Long Name " * 9] * 7)[:count]
    label = np.arange(50) % count
    places = np.random.default_rng(0).normal(size=(50, 2))
    pixels = class_maps([ClassMap("run $1", places, label), ClassMap("猫", places, label)], names, "long title " * 30)
    assert pixels.shape[1:] == (1000, 3) and pixels.dtype == np.uint8
    assert all((edge == 255).all() for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]))
    for half in np.split(pixels[100:500].astype(float), 2, axis=1):
        for colour in matplotlib.color_sequences["tab10"][:count]:
            seen = 255 * (0.75 * np.array(colour) + 0.25)
            assert (np.abs(half - seen).max(axis=-1) < 3).sum() > 20, "of each class on either side"


@pytest.mark.parametrize("patch", [2, 8, 14, 16, 32])
def test_item_15_every_hidden_patch_is_striped(patch: int) -> None:
    stripes = pictures.hatched(3 * patch, 4 * patch, patch)
    assert stripes.shape == (3 * patch, 4 * patch, 3) and stripes.dtype == np.uint8
    for cell in stripes.reshape(3, patch, 4, patch, 3).transpose(0, 2, 1, 3, 4).reshape(12, -1):
        assert 0.3 < (cell > 128).mean() < 0.7 and np.ptp(cell) > 100, "no even grey, as a background may be"


def test_item_15_a_sheet_has_room_for_what_else_is_to_be_known() -> None:
    plain, noted = (reconstruction_sheet([example(*CAPTION)], "t", note) for note in ("", pictures.OWN_STATISTICS))
    assert noted.width == plain.width and noted.height > plain.height + 15
    plain, noted = (
        ratio_sheet([dict.fromkeys(RATIOS, example(*CAPTION))], "t", note) for note in ("", pictures.OWN_STATISTICS)
    )
    assert noted.height > plain.height + 15


def test_any_unicode_is_drawn_and_what_the_font_lacks_is_named() -> None:
    words = (" Käfer", " кошка", " 猫", " 🙂", " a\nb", "\x00", "\ufffd", " ")
    sheet = reconstruction_sheet([text_only(*(Word(w, True, " é") for w in words))], "Größe 猫")
    assert border_is_white(sheet)
    assert pictures._drawable("é 猫🙂\n") == "é \\u732b\\U0001f642\\n"


def metric_rows() -> list[dict[str, float]]:
    rows: list[dict[str, float]] = [
        {"step": s, "train/loss": 1 / (s + 1), "train/text_loss": 2.0, "train/lr": 1e-3} for s in range(40)
    ]
    rows[20] |= {"val/loss": 0.3, "val/image_loss": 0.2, "prior/text_loss": 5.0}
    return rows


def test_curves_have_one_panel_a_term_with_the_total_first() -> None:
    names = [name for row in metric_rows() for name in row]
    assert pictures.loss_terms(names) == ["loss", "text_loss", "image_loss"]
    assert pictures.loss_terms(names[::-1])[0] == "loss"
    assert pictures.loss_terms(["train/image_loss/some_loss", "prior/loss", "time/loss"]) == []


@pytest.mark.parametrize("count", [0, 1, 40])
def test_curves_write_a_png(tmp_path: Path, count: int) -> None:
    path = tmp_path / "curves.png"
    curves(metric_rows()[:count], path, "costs $5 and $6: " + "long " * 30)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width >= 400


def test_imports_no_accelerator_library_and_no_pyplot() -> None:
    heavy = "{'jax', 'tensorflow', 'matplotlib.pyplot'}"
    code = f"import sys, m3ae_jax.report.pictures; print({heavy} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
