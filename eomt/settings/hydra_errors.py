"""What keeps Hydra from composing, in a sentence of this project."""

import re
from collections.abc import Sequence
from pathlib import Path

from yaml import YAMLError

from eomt.command_line import one_sentence
from eomt.places import CONFIGS
from eomt.suggestions import did_you_mean

# what Hydra lets through from YAML, and of values that it cannot use
CONFIG_ERRORS = (YAMLError, ValueError, RecursionError)
SEVERAL = re.compile(r"Ambiguous value for argument '(.*)'$|Sweep parameters '(.*)' requires --multirun", re.MULTILINE)


def explain_config(error: Exception, words: Sequence[str] = ()) -> str:
    """Returns the sentence for what keeps Hydra from composing.

    Args:
        error: one of Hydra's and OmegaConf's own, or of `CONFIG_ERRORS`.
        words: of the command line, whose `--config-dir` or `--config-path` may hold the file that is to blame.
    """
    if isinstance(error, RecursionError):
        return "a configuration is nested too deeply to be read"
    if "Recursive interpolation" in str(error):
        blamed = " and ".join(word for word in words if "${" in word) or "a configuration"
        return f"{blamed}: a value that is made of itself has no end; write it out"
    if not isinstance(error, UnicodeDecodeError):
        return about_override(error) or one_sentence(error)
    named = [
        words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--config-dir", "--config-path", "-cd", "-cp")
    ]
    files = [path for folder in (*named, CONFIGS) for path in sorted(Path(folder).rglob("*.yaml"))]
    culprit = next((path for path in files if path.read_bytes().startswith(error.object)), "a configuration")
    return f"{culprit} is no text in UTF-8 ({error}): save it as that"


def about_override(error: Exception) -> str | None:
    """The sentence for a word of the command line that Hydra cannot read or find; None for any other error."""
    kind = type(error).__name__
    if several := SEVERAL.match(str(error)):
        word = several[1] or several[2]
        key, _, value = word.partition("=")
        a_list = f", and {key}=[{value}] is a list" if several[1] else ""
        return f"{word} is several values: --multirun makes a run of each{a_list}"
    if kind == "OverrideParseException" and "=" not in error.override:
        return f"{error.override} is no setting: write key=value, without spaces around the =; --help lists the flags"
    if kind == "OverrideParseException":
        remedy = "close brackets and quotes, and put a value with spaces, = or brackets into quotes of its own"
        return f"{error.override} cannot be read: {remedy}, \"KEY='VALUE'\""
    if kind == "MissingConfigException" and error.missing_cfg_file:
        return not_there(str(error.missing_cfg_file), error.options or ())
    return None


def not_there(file: str, options: Sequence[str]) -> str:
    """The sentence for a choice of a group, `model/resnet`, or a whole configuration that no file is called by."""
    group, _, name = file.rpartition("/")
    known = list(options) if group else sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    known = [each for each in known if each != "base"]
    close = did_you_mean(name, known)
    choose = f"{' C' if close else ': c'}hoose from {', '.join(known)}" if known else ""
    return f"{f'{group}={name}' if group else f'--config-name {name}'} is not there{close}{choose}"
