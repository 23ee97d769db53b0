"""What is held back from the console, and when it is shown."""

import os

import pytest

from m3ae_jax import console


@pytest.mark.parametrize(
    ("raised", "shown"),
    [(None, ""), (SystemExit(75), ""), (KeyboardInterrupt(), ""), (ImportError("broken"), "noise\n")],
)
def test_noise_is_shown_of_a_failure_alone(raised, shown, capfd):
    # A signal during the imports ended the program with TensorFlow's start-up lines on the console.
    def import_something():
        with console._stderr_kept():
            os.write(2, b"noise\n")
            if raised is not None:
                raise raised

    if raised is None:
        import_something()
    else:
        with pytest.raises(type(raised)):
            import_something()
    assert capfd.readouterr().err == shown
