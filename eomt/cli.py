"""`eomt COMMAND ...`: every script of the project by one command, also where there is no checkout."""

import runpy
import sys
from collections.abc import Sequence

from eomt import __version__
from eomt.command_line import fail
from eomt.places import COMMANDS, SCRIPTS, script_path
from eomt.suggestions import did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a script as if it had been called by its path; returns its exit code, or 2 for an unknown command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("--help", "-h", "help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        print(f"eomt-lora {__version__}")
        return 0
    if words[0] not in COMMANDS:
        return fail(f"eomt has no command {words[0]}{meant(words[0])} (eomt --help lists them)", 2)
    script, prefix, _ = COMMANDS[words[0]]
    return run_script(script, f"eomt {words[0]}", [*prefix, *words[1:]])


def meant(word: str) -> str:
    """The command that was meant, also by the name of its script."""
    scripts = {script: name for name, (script, prefix, _) in COMMANDS.items() if not prefix}
    name = scripts.get(word.removesuffix(".py").replace("-", "_"))
    return f"; did you mean {name}?" if name else did_you_mean(word, COMMANDS)


def run_script(script: str, name: str, words: Sequence[str]) -> int:
    """Runs a script with these words; the training keeps its path, by which it starts further processes."""
    path = script_path(script)
    sys.path.insert(0, str(SCRIPTS))  # where `python scripts/NAME.py` has it, too
    sys.argv = [str(path) if path.parent != SCRIPTS else name, *words]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        raise
    return 0


def help_text() -> str:
    """Returns the text of `eomt --help`."""
    commands = "\n".join(f"  {name:<14}{meaning}" for name, (_, _, meaning) in COMMANDS.items())
    return f"""Fine-tune EoMT, a plain ViT that segments, with and without LoRA.

usage: eomt COMMAND ...

Commands (eomt COMMAND --help shows how)
{commands}

Examples
  eomt train experiment=toy_source output_dir=outputs/toys
  eomt train --use_lora --images photos/ --masks masks/ --classes classes.yaml
  eomt predict outputs/lora/adapter photos/ predictions/"""
