"""What is held back from the console, and when it is shown."""

import os
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


@pytest.mark.parametrize("where", ["gc.callbacks.append(in_a_callback)", "in_a_callback()", "Dies().__del__"])
def test_sigterm_ends_the_program_wherever_it_comes(where):
    # What is raised in a collector's callback or a finalizer is dropped: a run once went on after a SIGTERM.
    program = f"""
    import gc, os, signal, time
    from m3ae_jax import console

    def in_a_callback(*_):
        gc.callbacks.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass

    class Dies:
        __del__ = in_a_callback

    console.exit_on_sigterm()
    {where}
    gc.collect()
    time.sleep(60)
    print("went on")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 75
    assert ended.stdout == "stopped outside the training steps; the same command goes on\n" and not ended.stderr
