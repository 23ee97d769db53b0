"""The pictures for a person: sizes, wrapping, colours, and that nothing is cut off."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3ae_jax.report import pictures
from m3ae_jax.report.pictures import Reconstruction, Word, curves, reconstruction_sheet

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


def test_aspect_ratio_is_kept() -> None:
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
