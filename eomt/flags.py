"""The command line of `train_with_lora.py`: short flags, which stand for overrides; and every script's `--help`."""

import argparse
import functools
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from eomt.command_line import PATH_KEYS, expand_home, open_mapping, quote_path
from eomt.places import as_typed
from eomt.suggestions import did_you_mean, option_meant, settings_known


@dataclass(frozen=True)
class Flag:
    """A short flag.

    Args:
        override: that it stands for; every {} is a value.
        values: how many it takes; None: one or more, which make a list.
        default: taken where no value follows; None: one must follow.
    """

    override: str
    values: int | None = 1
    default: str | None = None


FLAGS = {
    "--config": Flag("--config-name {}"),
    "--data": Flag("data={}"),
    "--dataset_root": Flag("data.root={}"),
    "--images": Flag("data.images={}"),
    "--masks": Flag("data.masks={}"),
    "--classes": Flag("data.classes={}"),
    "--model": Flag("model={}"),
    "--backbone_weights": Flag("model.backbone_weights={}"),
    "--ckpt_path": Flag("model.ckpt_path={}"),
    "--use_lora": Flag("model.use_lora={}", default="true"),
    "--lora_rank": Flag("model.lora_rank={}"),
    "--lora_alpha": Flag("model.lora_alpha={}"),
    "--lora_dropout": Flag("model.lora_dropout={}"),
    "--lora_target_modules": Flag("model.lora_target_modules=[{}]", values=None),
    "--lora_blocks": Flag("model.lora_blocks={}"),
    "--epochs": Flag("trainer.max_epochs={}"),
    "--max_steps": Flag("trainer.max_steps={}"),
    "--batch_size": Flag("data.batch_size={}"),
    "--lr": Flag("model.lr={}"),
    "--img_size": Flag("model.img_size=[{},{}]", values=2),
    "--num_workers": Flag("data.num_workers={}"),
    "--precision": Flag("trainer.precision={}"),
    "--devices": Flag("trainer.devices={}"),
    "--seed": Flag("seed={}"),
    "--resume": Flag("resume={}", default="auto"),
    "--output_dir": Flag("output_dir={}"),
    "--use_wandb": Flag("logger=wandb", values=0),
}
STAND_FOR = {name: flag.override.partition("=")[0] if flag.values != 0 else "" for name, flag in FLAGS.items()}
BOOLEANS = ("true", "false")
OWN_DATA = ("--images", "--masks", "--classes")  # of data=folder
HYDRA_FLAGS = {"--config-name": 1, "--config-dir": 1, "--config-path": 1, "--cfg": 1, "--package": 1, "--info": 1}
HYDRA_FLAGS |= {"--multirun": 0, "-m": 0, "--resolve": 0, "--run": 0, "--version": 0}
HYDRA_FLAGS |= {"--hydra-help": 0, "--shell-completion": 0}
HYDRA_FLAGS |= {"-cn": 1, "-cd": 1, "-cp": 1, "-c": 1, "-p": 1, "-i": 1, "-r": 0, "-sc": 0}


def translate_flags(arguments: Sequence[str]) -> list[str]:
    """Short flags as Hydra overrides; everything else unchanged.

    `--use_lora` chooses the `cityscapes_lora` configuration, unless another one was named. Hydra's own options come
    first, because its parser wants the overrides in one piece.

    Raises:
        ValueError: an unknown flag, or one without its values.
    """
    if strange := [word for word in arguments if "\0" in word]:
        raise ValueError(f"{strange[0]!r} has a NUL in it, which no path and no value can hold: leave it out")
    options, overrides = [], []
    rest = [part for word in arguments for part in split_flag(word)]
    given = {word for word in rest if word.startswith("--")}
    while rest:
        word = rest.pop(0)
        if word in FLAGS:
            values, rest = take_values(word, rest)
            chosen, words = OTHERWISE.get(word, stands_for)(word, values)
            options, overrides = [*options, *chosen], [*overrides, *words]
        elif word == "--experimental-rerun":
            raise ValueError(f"{word} opens a pickle, which may run anything: give the command of summary.json again")
        elif word in HYDRA_FLAGS:
            count = HYDRA_FLAGS[word]
            options, rest = [*options, word, *rest[:count]], rest[count:]
        elif word.startswith("-"):
            close = option_meant(word, STAND_FOR, settings_known()) or did_you_mean(word, HYDRA_FLAGS)
            raise ValueError(f"unknown option {word}{close or ': see --help'}")
        else:
            overrides.append(word)
    if "output_dir=" in overrides:
        raise ValueError("output_dir= names no folder: give one, or leave it out for a new one in outputs/")
    if "--use_lora" in given and "model.use_lora=true" in overrides and not {"--config-name", "-cn"} & set(options):
        options = ["--config-name", "cityscapes_lora", *options]
    if given & set(OWN_DATA) and not any(word.startswith(("data=", "experiment=")) for word in overrides):
        overrides.insert(0, "data=folder")
    if "--max_steps" in given and not any(word.startswith("trainer.max_epochs=") for word in overrides):
        overrides.append("trainer.max_epochs=-1")  # else the shorter of both ends the run
    sweeps = bool({"--multirun", "-m"} & set(options))
    return options + [open_mapping(quote_path(expand_home(word), sweeps)) for word in overrides]


def take_values(flag: str, rest: list[str]) -> tuple[list[str], list[str]]:
    """Splits the words behind a flag into its values and what follows; ValueError where values are missing."""
    asked = FLAGS[flag]
    is_path = asked.override.partition("=")[0] in PATH_KEYS

    def is_value(word: str) -> bool:
        return not word.startswith("--") and ("=" not in word or is_path)

    if asked.default is not None:
        taken = bool(rest) and is_value(rest[0]) and (asked.default not in BOOLEANS or rest[0].lower() in BOOLEANS)
        return (
            ([rest[0].lower() if asked.default in BOOLEANS else rest[0]], rest[1:])
            if taken
            else ([asked.default], rest)
        )
    if asked.values is None:
        count = next((k for k, word in enumerate(rest) if not is_value(word)), len(rest))
    else:
        count = asked.values
    values = rest[:count]
    values = list(itertools.takewhile(is_value, values))
    if len(values) < max(count, asked.values is None):
        wanted = "values" if count > 1 else "value" if asked.values else "values, one or more"
        line = flag_line(flag, asked).split("  ")[1]
        told = f"{asked.values or ''} {wanted}, got {' '.join(values) or 'none'}: write {line}"
        raise ValueError(f"{flag} takes {told.strip()}")
    return values, rest[count:]


def stands_for(flag: str, values: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's options and the overrides that a flag with these values stands for."""
    asked = FLAGS[flag]
    return [], [asked.override.format(*([",".join(values)] if asked.values is None else values))]


def choose_config(flag: str, values: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--config NAME`, or a YAML file anywhere."""
    path = Path(values[0]).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        return ["--config-name", values[0]], []
    if not path.is_file():
        raise ValueError(f"{flag} {values[0]}: no such file; the name of a configuration, or a YAML file of your own")
    return ["--config-dir", str(path.resolve().parent), "--config-name", path.stem], []


def choose_data(flag: str, values: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--data NAME`; ValueError for a folder, which is another flag's."""
    if "/" in values[0]:
        raise ValueError(f"{flag} takes the name of a data set, got {values[0]}: its folder is for --dataset_root")
    return stands_for(flag, values)


OTHERWISE: dict[str, Callable] = {"--config": choose_config, "--data": choose_data}  # what no single override says


def split_flag(word: str) -> list[str]:
    """`--flag=value` as two words; overrides stay whole."""
    name, equals, value = word.partition("=")
    if name in FLAGS and FLAGS[name].default in BOOLEANS and equals and value.lower() not in BOOLEANS:
        raise ValueError(f"{name} takes true or false, got {value}")
    return [name, value] if name.startswith("--") and equals else [word]


def flag_line(name: str, flag: Flag) -> str:
    """One line of `--help`."""
    values = " [VALUE]" if flag.default else " VALUE ..." if flag.values is None else " VALUE" * flag.values
    meaning = flag.override.replace("[{}]", "[VALUE,...]").replace("{}", "VALUE")
    note = f" (default {flag.default})" if flag.default else ""
    return f"  {name + values:<32}{meaning}{note}"


def help_text(configs: Path) -> str:
    """Returns the text of `--help`: examples, flags, configuration groups and the LoRA options with their defaults."""
    flags = "\n".join(flag_line(name, flag) for name, flag in FLAGS.items())
    groups = "\n".join(
        textwrap.fill(
            ", ".join(sorted(file.stem for file in folder.glob("*.yaml") if file.stem != "base")),
            width=78,
            initial_indent=f"  {folder.name:<12}",
            subsequent_indent=" " * 14,
        )
        for folder in sorted(configs.iterdir())
        if folder.is_dir()
    )
    lora = "\n".join(
        f"  model.{line}"
        for line in (configs / "model" / "base.yaml").read_text().splitlines()
        if line.startswith(("use_lora", "lora_"))
    )
    return f"""Train EoMT for semantic segmentation, as a full fine-tune or with LoRA.

usage: python train_with_lora.py [flags] [group=choice ...] [key=value ...]

Examples
  python train_with_lora.py --config-name cityscapes_lora \\
      data.root=/data/cityscapes model.lora_rank=8
  python train_with_lora.py --use_lora --lora_rank 16 --epochs 50 \\
      --model vit_small --images photos/ --masks masks/ --classes classes.yaml
  python train_with_lora.py experiment=toy_source # no data, download or GPU

Configurations (--config-name)
  {", ".join(sorted(file.stem for file in configs.glob("*.yaml")))}

Groups (group=choice)
{groups}

LoRA options and their defaults
{lora}

Short flags and what they stand for
{flags}

  --cfg job             print the composed configuration and exit
  --multirun            one run for each of model.lora_rank=4,8,16
  --hydra-help          options of Hydra itself
"""


# Scripts

WIDTH = 80  # columns that `--help` takes at most
COMMAND, WORD = (
    re.compile(r" +(python|eomt) "),
    re.compile(r'(?:-- )?(?:--[\w-]+ [^\s=-][^\s=]*(?!\S)|(?:"[^"]*"|\S)+)'),
)
ROW = re.compile(r"( *\S+(?: \S+)* {2,})(\S.*)")  # of a table: a name, or several, and what it is


class ScriptParser(argparse.ArgumentParser):
    """Names the option that was meant where one is mistyped, or the setting where a script takes them.

    `own_settings` are words KEY=VALUE that no configuration has.
    """

    own_settings: tuple[str, ...] = ()

    def error(self, message: str) -> NoReturn:
        start, unknown, words = message.partition("unrecognized arguments: ")
        option = next((word.partition("=")[0] for word in words.split() if word.startswith("--")), "")
        flags = dict.fromkeys(itertools.chain(*(action.option_strings for action in self.known())), "")
        word = STAND_FOR.get(option, option).rpartition(".")[2]  # --dataset_root: data.root
        super().error(start + unknown + words + (option_meant(word, flags, self.settings()) if option else ""))

    def known(self) -> list[argparse.Action]:
        """What it takes, and what its commands take."""
        choices = (action.choices.values() for action in self._actions if isinstance(action.choices, dict))
        commands = [each for each in itertools.chain(*choices) if isinstance(each, ScriptParser)]
        return [*self._actions, *itertools.chain(*(command.known() for command in commands))]

    def settings(self) -> list[str]:
        """The settings that may be given: none, those of data, or all."""
        told = " ".join(str(action.metavar) for action in self.known() if not action.option_strings)
        known = settings_known() if "=" in told else []
        return [*self.own_settings, *(name for name in known if "data=" not in told or name.startswith("data"))]


def script_parser(description: str | None, epilog: str = "", **options: Any) -> argparse.ArgumentParser:
    """Returns the parser of a script, whose `--help` looks as `help_style` says."""
    options |= {"usage": as_typed(options["usage"])} if "usage" in options else {}
    return ScriptParser(**help_style(description, epilog), **options)


def add_output_dir(
    parser: argparse.ArgumentParser, help: str, instead_of: str | None = None, required: bool = False
) -> None:
    """Adds what says where to write, in every script: `--output_dir`, of which argparse takes any beginning.

    Args:
        parser: of a script, or of a command of one.
        help: what is written there, and the default.
        instead_of: an argument without a flag that may say it, too: the OUT of `IN OUT`. `output_dir` then reads it.
    """
    if instead_of:
        parser.add_argument("out", metavar=instead_of, type=Path, nargs="?", help=f"{help}; or --output_dir")
    help = argparse.SUPPRESS if instead_of else help
    parser.add_argument("--output_dir", type=Path, metavar="PATH", required=required, help=help)


def output_dir(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Path:
    """Where to write, by the argument or by `--output_dir`; ends the script where neither says it, or both do."""
    given = [place for place in (args.out, args.output_dir) if place is not None]
    if len(given) != 1:
        told = " and ".join(map(str, given)) or "neither"
        parser.error(f"say once where to write, behind what is read or with --output_dir; got {told}")
    return given[0]


def script_words(words: Sequence[str] | None) -> list[str]:
    """The command line of a script that writes, with `output_dir=FOLDER` as the option that it stands for."""
    words = sys.argv[1:] if words is None else words
    return [f"--{word}" if word.startswith("output_dir=") else word for word in words]


def help_style(description: str | None = None, epilog: str = "") -> dict[str, Any]:
    """Returns what argparse needs for a `--help` of at most 80 columns, whatever the screen; see `in_columns`."""
    width = min(shutil.get_terminal_size().columns - 2, WIDTH)
    return {
        "description": in_columns(description or ""),
        "epilog": in_columns(epilog),
        "formatter_class": functools.partial(argparse.RawDescriptionHelpFormatter, width=width),
    }


def in_columns(text: str) -> str:
    """Wraps paragraphs and tables to 80 columns, and lets long commands go on behind a backslash.

    Commands are named as the user has them.
    """
    return "\n".join(line for block in _blocks(as_typed(text)) for line in _wrapped(block))


def _blocks(text: str) -> list[str]:
    """Paragraphs, rows of tables and commands, each as one line."""
    blocks: list[str] = []
    for line in text.strip().splitlines():
        last = blocks[-1] if blocks else ""
        row = None if COMMAND.match(last) else ROW.match(last)
        indent = len(line) - len(line.lstrip())
        if last.endswith("\\"):
            blocks[-1] = f"{last[:-1].rstrip()} {line.strip()}"
        elif (row and line and indent == len(row[1])) or (_is_prose(line) and _is_prose(last)):
            blocks[-1] = f"{last.rstrip()} {line.strip()}"
        else:
            blocks.append(line)
    return blocks


def _is_prose(line: str) -> bool:
    return bool(line) and not line.startswith(" ") and not line.endswith(":") and not ROW.match(line)


def _wrapped(block: str) -> list[str]:
    """A block in lines."""
    if len(block) <= WIDTH:
        return [block]
    if COMMAND.match(block):
        return _wrapped_command(*re.split(r" +# ", block, maxsplit=1))
    row = ROW.match(block)
    first, rest = (row[1], row[2]) if row else ("", block)
    fill = textwrap.TextWrapper(WIDTH, first, " " * len(first), break_long_words=False, break_on_hyphens=False)
    return fill.wrap(rest)


def _wrapped_command(command: str, comment: str = "") -> list[str]:
    """A command in lines that a shell reads as one; its comment stands above, since none may follow a backslash."""
    lines = [f"  # {comment}"] if comment else []
    line = ""
    for word in WORD.findall(command):
        if len(f"{line} {word} \\") > WIDTH:
            lines.append(f"{line} \\")
            line = f"      {word}"
        else:
            line = f"{line} {word}" if line else f"  {word}"
    return [*lines, line]


def positive(text: str) -> int:
    """Reads a number of things; argparse says what is wrong with another text."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 on")
    return int(text)
