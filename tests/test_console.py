"""What is held back from the console, and when it is shown."""

import os
import re
import subprocess
import sys
import textwrap

import pytest

from m3ae_jax import console


@pytest.mark.parametrize(
    ("raised", "shown"),
    [(None, ""), (SystemExit(75), ""), (KeyboardInterrupt(), ""), (ImportError("broken"), "noise\n")],
)
def test_noise_is_shown_of_a_failure_alone(raised, shown, capfd):
    # A signal during the imports ended the program with TensorFlow's start-up lines on the console.
    def import_something():
        with console._stderr_held_back():
            os.write(2, b"noise\n")
            if raised is not None:
                raise raised

    if raised is None:
        import_something()
    else:
        with pytest.raises(type(raised)):
            import_something()
    assert capfd.readouterr().err == shown


def test_item_3_what_ends_the_program_is_told_while_noise_is_held_back(capfd):
    # A SIGINT, or a fellow process's mistake, during TensorFlow's import ended the program without a word.
    with console._stderr_held_back():
        console.tell("error: interrupted")
    assert capfd.readouterr().err == "error: interrupted\n"


def test_item_3_a_program_ends_though_nobody_reads_its_console_any_more():
    # Ctrl-C ends `tee` too: the last line raised BrokenPipeError in the thread that ends the program, which went on.
    program = """
    from m3ae_jax import console

    console.tell("stopped")
    console.leave(75)
    """
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], stdout=writer, stderr=writer, timeout=50)
    os.close(writer)
    assert ended.returncode == 75


@pytest.mark.parametrize("where", ["gc.callbacks.append(in_a_callback)", "in_a_callback()", "Dies().__del__"])
@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        ("SIGTERM", 75, "stopped outside the training steps; the same command goes on\n"),
        ("SIGINT", 130, "error: interrupted; the same command goes on from the last checkpoint\n"),
    ],
)
def test_item_3_a_signal_ends_the_program_wherever_it_comes(where, number, code, told):
    # What is raised in a collector's callback or a finalizer is dropped: a run once went on after a SIGTERM.
    program = f"""
    import gc, os, signal, time
    from m3ae_jax import console

    def in_a_callback(*_):
        gc.callbacks.clear()
        os.kill(os.getpid(), signal.{number})
        for _ in range(1000):
            pass

    class Dies:
        __del__ = in_a_callback

    signal.signal(signal.SIGINT, signal.default_int_handler)
    console.exit_on_signals()
    {where}
    gc.collect()
    time.sleep(60)
    print("went on")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=50)
    assert ended.returncode == code and ended.stdout + ended.stderr == told


LONG = "a cell of many words that no column of a console is wide enough for, whatever else stands in its row"


@pytest.mark.parametrize("columns", [2, 3, 8, 14])
def test_item_15_tables_are_aligned_and_fit_100_columns(columns):
    heads = [f"column number {i} of them" for i in range(columns)]
    rows = [[f"row {r}", *(f"{r + 1}.{i:03d} ± 0.011" for i in range(columns - 2)), LONG] for r in range(3)]
    markdown = "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * columns, *rows])
    shown = console.readable(f"{markdown}\n\nVerdict: {LONG}; {LONG}.").split("\n\nVerdict: ")[0].splitlines()
    assert max(map(len, shown)) <= 100
    text = " ".join(" ".join(shown).split())
    assert all(word in text for word in ("column", "row 2", "many", "whatever"))
    if rule := next((line for line in shown if set(line) <= {"-", " "}), None):
        starts = [match.start() for match in re.finditer("-+", rule)]
        assert len(starts) == columns
        for line in shown:  # between two columns there are always blanks
            assert all(line[start - 2 : start].strip() == "" for start in starts)


def test_item_15_a_table_of_more_columns_than_fit_becomes_a_block_for_each_row():
    heads = [f"column_{i:010d}" for i in range(14)]
    shown = console.table([[f"cell {i}" for i in range(14)], ["another", *[""] * 13]], heads)
    first, second = shown.split("\n\n")
    assert first.splitlines()[3] == "  column_0000000003  cell 3" and len(first.splitlines()) == 14
    assert second == "  column_0000000000  another"


def test_item_15_names_and_values_wrap_under_the_value():
    assert console.table([("steps", 1200), ("a longer name", "x")]) == "  steps          1200\n  a longer name  x"
    wrapped = console.table([("not known yet", LONG)]).splitlines()
    assert [len(line) <= 100 for line in wrapped] == [True, True] and wrapped[1].startswith(" " * 17)
    assert console.table([]) == ""


def test_item_15_numbers_stand_to_the_right():
    assert console.table([["a", "0.5"], ["b", "12.25"]], ["", "share"]).splitlines() == [
        "     share", "  -  -----", "  a    0.5", "  b  12.25",
    ]  # fmt: skip


def test_item_15_heads_take_more_lines_before_cells_do():
    cells = ["a" * 20 + " b", "-0.004 [-0.014, +0.004]", "c" * 24 + " d"]
    heads = ["hidden", "true - shuffled, 95 % interval", "a head of words"]
    shown = console.table([[*cells, "0.004"]], [*heads, "other modality true"])
    last = shown.splitlines()[-1]
    assert all(cell in last for cell in cells) and max(map(len, shown.splitlines())) <= 100


def test_item_15_commands_name_the_python_that_runs_unless_python_does(monkeypatch, tmp_path):
    (tmp_path / "python").write_text("")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert console.python() == "python"
    monkeypatch.setenv("PATH", "/nowhere")
    assert console.python() == str(tmp_path / "python3")
