"""The page: one file, whatever the data hold."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from m3ae_jax.report import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCRIPT = "<script>alert(1)</script>"
HEBREW = "\u05e9\u05dc\u05d5\u05dd"
HOSTILE = (
    SCRIPT,
    '"><img src=https://example.com/x.png onerror="alert(1)">',
    "</td></table></section></body>",
    f"{HEBREW} \u202eoverride",
    "nul \0 bell \x07 escape \x1b[31m",
    "lone \ud800 surrogate",
    "&lt;b&gt; & 'quotes'",
)
VOID = ("meta", "link", "img", "br")


class Balance(HTMLParser):
    """Checks that tags are balanced; collects tags, references and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for key, value in attributes if key in ("src", "href", "srcset", "action")]
        assert not any(key.startswith("on") for key, _ in attributes), attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(text):
    """A whole page: balanced, without scripts, and nothing in it leads out of the file."""
    parsed = Balance(text)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert all(reference.startswith(("data:", "#")) for reference in parsed.references), parsed.references
    assert not re.search(r"url\(|@import", text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)
    return parsed


def browser():
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")


def load_in_browser(file, profile):
    """The page's DOM as a browser builds it, and what its console logged."""
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={profile}", "--dump-dom", f"file://{file}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def hostile_page(workdir):
    drawn = Figure((2, 1))
    drawn.add_subplot().plot([1, 2])
    parts = [
        page.heading(SCRIPT),
        *(page.paragraph("before ", page.data(text), " after") for text in HOSTILE),
        page.table(["words", "count"], [[text, i] for i, text in enumerate(HOSTILE)]),
        page.gallery([page.figure(drawn, alt=HOSTILE[1], caption=text) for text in HOSTILE[:2]]),
        page.bullets(HOSTILE),
        page.note(page.code(SCRIPT)),
        page.element("span", "x", class_='"><script>'),
    ]
    page.write(workdir, 10, "hostile", SCRIPT, *parts)
    return page.build(workdir, f"runs/{SCRIPT}")


def test_whatever_comes_from_data_is_text(tmp_path):
    text = hostile_page(tmp_path).read_text(encoding="utf-8")
    parsed = check(text)
    assert parsed.text.count(SCRIPT) >= 6, "it is shown, as it is written"
    assert HEBREW in parsed.text and "\\u202eoverride" in parsed.text and "\\x00" in parsed.text


def test_the_page_joins_the_fragments_in_order(tmp_path):
    page.write(tmp_path, 30, "evaluations", "Evaluations", page.paragraph("third"))
    page.write(tmp_path, 5, "summary", "Summary", page.paragraph("first"))
    page.write(tmp_path, 10, "curves", "Curves", page.paragraph("old"))
    page.write(tmp_path, 10, "curves", "Curves & more", page.paragraph("second"))
    (tmp_path / "report" / "data.json").write_text("{}")
    (tmp_path / "report" / "notes.html").write_text("not a fragment")
    built = page.build(tmp_path, "runs/x")
    text = built.read_text(encoding="utf-8")
    parsed = check(text)
    assert built == tmp_path / "report.html"
    assert parsed.references[1:] == ["#05-summary", "#10-curves", "#30-evaluations"]
    assert all(f'id="{anchor[1:]}"' in text for anchor in parsed.references[1:])
    assert re.findall("first|second|third|old|not a fragment", text) == ["first", "second", "third"]
    assert parsed.text.count("Curves & more") == 2, "in the table of contents and above its section"
    assert sorted(p.name for p in (tmp_path / "report").iterdir() if p.suffix == ".tmp") == []


def test_a_page_without_fragments_is_a_page(tmp_path):
    check(page.build(tmp_path, "runs/x").read_text())


def test_figures_are_part_of_the_file():
    drawn = Figure((2, 1))
    assert 'src="data:image/png;base64,' in page.figure(drawn, "a line")
    assert 'src="data:image/jpeg;base64,' in page.figure(b"\xff\xd8\xff\xe0", "a photograph")
    with pytest.raises(ValueError, match="PNG or a JPEG"):
        page.figure(b"GIF89a", "an animation")


@pytest.mark.parametrize(
    ("cell", "number"),
    [(1234, True), (0.5, True), ("1,234", True), ("0.5 %", True), ("12 red cars", False), (True, False),
     ("", False), (page.escape("12"), False)],
)  # fmt: skip
def test_numbers_stand_to_the_right(cell, number):
    assert ('class="number"' in page.table(["a"], [[cell]])) == number


def test_a_name_that_would_not_be_found_is_refused(tmp_path):
    with pytest.raises(ValueError, match="letters, digits"):
        page.write(tmp_path, 10, "a/b", "A")


def test_a_browser_shows_it_without_complaint(tmp_path):
    dom, console = load_in_browser(hostile_page(tmp_path), tmp_path / "profile")
    assert console == []
    assert "&lt;script&gt;alert(1)" in dom and "<script" not in dom
    assert dom.count("<section") == 1


MEASURE = """<script>
const cut = [...document.querySelectorAll(".wide > table")].filter(
  table => table.parentElement.scrollWidth > table.parentElement.clientWidth
);
const names = cut.map(table => table.innerText.slice(0, 40));
parent.postMessage([innerWidth, document.documentElement.scrollWidth, ...names].join("|"), "*");
</script>"""
FRAME = """<title></title><script>onmessage = event => { document.title = event.data; };</script>
<iframe src="measured.html" width="WIDTH" height="900" style="border: 0"></iframe>"""


def cut_off(file, profile, width):
    """The window's width as the page has it, that of all it shows, and the tables that are cut at its edge."""
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", file.read_text(encoding="utf-8"))
    file.with_name("measured.html").write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    frame = file.with_name("frame.html")  # a window of its own is never narrower than 500
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,900",
        "--virtual-time-budget=5000", f"--user-data-dir={profile}", "--dump-dom", f"file://{frame}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    window, whole, *tables = re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)[1].split("|")
    return int(window), int(whole), tables
