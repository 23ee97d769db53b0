r"""Other projects' weights in, and ours out.

    python -m m3ae_jax.convert --from=model.pkl --workdir=runs/m3ae_large --config.data.tokenizer=vocab.txt
    python -m m3ae_jax.convert --from=mae_pretrain_vit_base.pth --workdir=runs/mae_base
    python -m m3ae_jax.convert --from=FOLDER_OF_VITMAE --workdir=runs/vitmae
    python -m m3ae_jax.convert --from=runs/mine --to=vitmae --output=FOLDER
    python -m m3ae_jax.convert --from=runs/mine --to=timm --output=encoder.safetensors

A run's folder that was made so is used as any other: by `m3ae_jax.load`, --mode=eval and --config.init_from.
"""

from __future__ import annotations

import m3ae_jax.console as console

console.quiet_environment()

from absl import flags  # noqa: E402

import m3ae_jax.command_line as command_line  # noqa: E402
from m3ae_jax.errors import UserError  # noqa: E402
from m3ae_jax.paths import local  # noqa: E402

_FROM = flags.DEFINE_string("from", None, "A file or folder of another project; with --to a run.", required=True)
_FORMAT = flags.DEFINE_string("format", "", "What --from is, if it cannot be detected.")
_WORKDIR = flags.DEFINE_string("workdir", "", "The run's folder to make.")
_LICENSE = flags.DEFINE_string("license", "", "Of the weights, for the run's MODEL.md, as 'CC BY-NC 4.0'.")
_TO = flags.DEFINE_string("to", "", "Writes a run for m3ae, mae, vitmae, timm or as safetensors.")
_OUTPUT = flags.DEFINE_string("output", "", "With --to: the file or folder to write.")
_ENCODER_ONLY = flags.DEFINE_bool("encoder_only", False, "With --to: without the decoder.")

_overrides: list[tuple[str, str]] = []


def _main(argv: list[str]) -> None:
    del argv
    console.start_logging()
    if bool(_TO.value) == bool(_WORKDIR.value) or bool(_TO.value) != bool(_OUTPUT.value):
        raise UserError("give --workdir to convert into a run, or --to and --output to write one for others")
    _export() if _TO.value else _import()


def _import() -> None:
    import m3ae_jax.convert.check as check
    import m3ae_jax.convert.convert as convert

    workdir = local(_WORKDIR.value, "--workdir").resolve()
    convert.check_free(workdir)
    converted = convert.import_weights(local(_FROM.value, "--from"), _FORMAT.value, _overrides)
    print(converted.report.text())
    compared = check.compare(converted)
    print(compared.text())
    if not compared.close:
        raise UserError("the converted model does not compute what theirs does; nothing was written")
    convert.write_run(converted, workdir, _FROM.value, _LICENSE.value)
    print(f"written to {workdir}; its card is MODEL.md")


def _export() -> None:
    import m3ae_jax.convert.convert as convert
    import m3ae_jax.inference as inference

    stored = inference.read(_FROM.value)
    output = convert.output_of(_TO.value, local(_OUTPUT.value, "--output"))
    print(convert.export_weights(stored, _TO.value, output, encoder_only=_ENCODER_ONLY.value).text())
    print(f"step {stored.step} of {_FROM.value} written to {output}")


if __name__ == "__main__":
    command_line.run(_main, _overrides)
