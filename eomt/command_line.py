"""What every command line has: paths in quotes, errors in one sentence, signals, a screen of any kind."""

import errno
import functools
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType

from eomt.places import as_typed
from eomt.suggestions import meant


class RunError(RuntimeError):
    """A run must not go on; the sentence says why."""


EXPECTED_ERRORS = (ValueError, ImportError, OSError, RunError)  # of which a sentence says enough
OUT_OF_MEMORY = ("out of memory", "allocate memory", "CPUAllocator", "ALLOC_FAILED", "allocate shared memory")
LOADER_ENDED = re.compile(r"DataLoader worker \(.*\) (is killed by signal: ([\w ]+)|exited unexpectedly)")


class LogFile(logging.FileHandler):
    """The log of a run, which goes on where it cannot be written; the first time is said on the screen."""

    warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by logging where a record could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.warned:
            self.warned = True
            print(f"warning: {self.baseFilename} cannot be written, the run goes on without: {error}", file=sys.stderr)

    def close(self) -> None:
        with suppress(OSError):  # of what is left to be written
            super().close()


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that a screen obeys, but for tabs and new lines


def printable(text: str) -> str:
    """The text with control characters as escapes: names in files of others must not steer the screen."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


# Lightning's bars; tqdm's own class may be another one by now, since importing lightning_sdk loads tqdm again
BARS = "lightning.pytorch.callbacks.progress.tqdm_progress"


class ScreenLog(logging.StreamHandler):
    """The same on the screen, where nobody may be left to read; a progress bar makes room for each line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without what a screen would obey."""
        return printable(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        bars = sys.modules.get(BARS)  # none without it
        with bars.Tqdm.external_write_mode(self.stream) if bars else nullcontext():
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, BrokenPipeError):
            print_to_nobody()
        elif not isinstance(error, OSError):
            super().handleError(record)


def print_to_nobody() -> None:
    """Points standard output at nothing once its reader is gone: what is still printed then fails nowhere."""
    with suppress(OSError, ValueError, AttributeError):  # where it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


PATH_KEYS = ("output_dir", "resume", "anomaly_root", "hydra.run.dir", "hydra.sweep.dir", "model.ckpt_path")
PATH_KEYS += tuple(f"data.{name}" for name in ("root", "images", "masks", "val_images", "val_masks", "classes"))
PATH_KEYS += tuple(f"data.cut_paste.cutouts.{name}" for name in ("root", "annotations", "images"))
PATH_KEYS += ("model.backbone_weights", "model.backbone_kwargs.pretrained_cfg_overlay.file")
LIBRARY_MAPPINGS = tuple(f"model.{name}{end}" for name in ("backbone_kwargs", "lora_options") for end in "=.")
TEXT_KEYS = ("data.image_template", "data.mask_template", "data.split_by")  # with letters that Hydra would read


def quote_path(word: str, sweeps: bool = False) -> str:
    """Returns an override of a path, or of another text that Hydra would read, in quotes: of `=`, commas, brackets.

    Left as they are: other overrides, what is quoted already, null, interpolations and, with `sweeps`, lists.
    """
    key, equals, value = word.partition("=")
    if key.lstrip("+") not in (*PATH_KEYS, *TEXT_KEYS) or not value or value == "null" or "${" in value:
        return word
    if unquoted(value) != value or (sweeps and "," in value):
        return word
    return f"{key}{equals}{quoted(value)}"


def quoted(text: object) -> str:
    """Returns text in quotes that Hydra takes off again, whatever is in it."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), str(text)) + "'"


def open_mapping(word: str) -> str:
    """An override of a mapping for a library, so that it takes keys that no YAML has yet, or that Hydra cannot read."""
    if not word.startswith(LIBRARY_MAPPINGS):
        return word
    key, _, value = word.partition("=")
    if value.startswith("{") and re.search("[\"'^]", value):  # YAML, with or without spaces behind its colons
        value = quoted(re.sub(r"(?<![?]):(?=[^ ])", ": ", value))  # which `read_mappings` reads
    return f"++{key}={value}"


def expand_home(word: str) -> str:
    """`output_dir=~/runs` without the `~`, of which no shell makes a folder behind a `=`, and Hydra one named so."""
    key, equals, value = word.partition("=")
    if key != "output_dir" or not value.lstrip("'\"").startswith("~/"):
        return word
    return key + equals + value.replace("~", os.path.expanduser("~"), 1)


def path_in(value: str) -> str | None:
    """Returns the path in the value of an override, without quotes; None for null."""
    return None if value == "null" else unquoted(value)


def unquoted(value: str) -> str:
    """Returns the text that was quoted; any other text as it is."""
    if len(value) < 2 or value[0] not in "'\"" or value[-1] != value[0]:
        return value
    return re.sub(r"(\\*)" + f"({value[0]}|$)", lambda found: found[1][: len(found[1]) // 2] + found[2], value[1:-1])


def plain_word(word: str) -> str:
    """An override without quotes that it does not need."""
    key, equals, value = word.partition("=")
    plain = key + equals + unquoted(value)
    return plain if re.fullmatch(r"[\w./-]+", unquoted(value)) or quote_path(plain, sweeps=True) == word else word


def quiet_libraries() -> None:
    """Keeps advertising and notes to developers out of the log; warnings about the run stay."""
    import lightning  # noqa: F401  it sets its logger's level when imported

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for name in ("bitsandbytes", "torch.utils._pytree"):  # that faster kernels exist; what torchao registers
        logging.getLogger(name).setLevel(logging.ERROR)
    notes = "LeafSpec|num_workers|logging interval|is not empty|before the epoch ended|use .self.log|WeightAveraging"
    notes += "|supported for historical reasons"
    warnings.filterwarnings("ignore", message=f".*({notes}).*")


@contextmanager
def own_process_state(argv: Sequence[str]) -> Iterator[bool]:
    """Hydra reads `sys.argv` and `HYDRA_FULL_ERROR`, and sets up the log: all are afterwards as before.

    Yields whether `HYDRA_FULL_ERROR` was 1. Hydra closes handlers that were there: a file opened with mode "w" stays
    closed.
    """
    before, setting = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    log = logging.getLogger()
    handlers, level = list(log.handlers), log.level
    sys.argv = list(argv)
    try:
        with any_screen():
            yield setting == "1"
    finally:
        sys.argv = before
        for handler in set(log.handlers) - set(handlers):
            handler.close()
        log.handlers[:] = handlers
        log.setLevel(level)
        os.environ.pop("HYDRA_FULL_ERROR", None)
        os.environ.update({} if setting is None else {"HYDRA_FULL_ERROR": setting})


def reports_errors(code: int = 1) -> Callable:
    """Decorates a script's `main`: an expected error is printed as one sentence, and `code` is returned."""

    def decorate(main: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def reporting(*args, **kwargs) -> int:
            try:
                with memory_explained(), ended_by_signals(), any_screen():
                    return main(*args, **kwargs) or 0
            except EXPECTED_ERRORS as error:
                return fail(error, code)
            except KeyboardInterrupt as ended:
                signum = signal.Signals(ended.args[0] if ended.args else signal.SIGINT)
                print(f"interrupted by {signum.name}: the same command starts again", file=sys.stderr)
                return 128 + signum

        return reporting

    return decorate


@contextmanager
def any_screen() -> Iterator[None]:
    """Prints letters that the screen does not know as escapes in the block, where they would be an error."""
    screen = sys.stdout
    if getattr(screen, "errors", None) != "strict" or not hasattr(screen, "reconfigure"):
        yield
        return
    screen.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        screen.reconfigure(errors="strict")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP, unless they are ignored, end the block as SIGINT does: no draft of a file is left."""
    may = threading.current_thread() is threading.main_thread()  # no other one may receive signals
    asked = [each for each in (signal.SIGTERM, signal.SIGHUP) if may and signal.getsignal(each) == signal.SIG_DFL]
    for signum in asked:
        signal.signal(signum, _interrupt)
    try:
        yield
    finally:
        for signum in asked:
            signal.signal(signum, signal.SIG_DFL)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signum)


@contextmanager
def memory_explained(explain: Callable[[], str] = lambda: "take a smaller network, or a machine with more") -> Iterator:
    """Turns an error that says in many lines that memory ran out into a RunError; `explain` says what can be done.

    A loader process that the system ended is such an error, too: it is killed when it is the largest.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        what = out_of_memory(error)
        if what is None:
            raise
        traceback.clear_frames(error.__traceback__)  # what they hold may be most of the memory
        remedy = "lower data.num_workers or data.batch_size" if what.startswith("a loader") else explain()
        raise RunError(f"{what}: {remedy}") from error


def out_of_memory(error: BaseException) -> str | None:
    """Says what ran out of memory if the error is about that; torch need not be there."""
    message = str(error)
    if isinstance(error, RunError):
        return None
    if ended := LOADER_ENDED.search(message):
        if "shared memory" in message:
            return "a loader process ran out of shared memory (/dev/shm; docker run --shm-size gives more)"
        return f"a loader process was ended by the system ({ended[2] or 'no signal'}), as it does where memory runs out"
    known = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not known and not any(sign in message for sign in OUT_OF_MEMORY):
        return None
    if message.startswith("Caught "):
        return "a loader process ran out of memory"
    return "the GPU ran out of memory" if "CUDA" in message else "out of memory"


def fail(error: BaseException | str, code: int) -> int:
    """Prints the error as one sentence and returns the exit code."""
    sentence = one_sentence(error) if isinstance(error, BaseException) else error
    print(f"error: {printable(as_typed(sentence))}", file=sys.stderr)
    return code


def one_sentence(error: BaseException) -> str:
    """An error without what libraries wrap around it: calls to targets, search paths, names of their own classes."""
    cause, message = error.__cause__, str(error).split("Config search path:")[0]  # a missing group lists choices first
    if type(error).__name__ == "InstantiationException" and cause is not None:
        return one_sentence(cause)
    if message.startswith("Could not override") and hasattr(cause, "parent_node"):
        name = max(message.split(chr(39))[1], getattr(cause, "full_key", None) or "", key=len)
        return f"{name} is not in the configuration{meant(name, str(cause.key), cause.parent_node)}"
    if message.startswith("Caught ") and "Original Traceback" in message:  # in a process that loads data
        message = re.sub(r"(?s:.*Traceback \().*\n(?: .*\n)*[\w.<>]+(: |\s*\Z)", "", message) or message.split()[1]
    return " ".join(message.split()) or type(error).__name__
