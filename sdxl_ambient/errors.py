"""What a user did wrong, as one line; and the one place that prints it."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something that the user can put right. The message is one line: what is wrong, its value, what to do."""


class OptionError(UserError, ValueError):
    """A wrong option. The message names the option, its value, and what is allowed."""


class JsonError(UserError, ValueError):
    """JSON that can't be read: damaged, not in UTF-8, nested too deeply, or with what is no JSON. The message says which."""


class TextError(UserError, ValueError):
    """A text file that can't be read. The message names the file, and what is wrong with it."""


class ImageError(UserError, ValueError):
    """An image that can't be used. The message is the reason."""


class ImagesMissing(UserError, ValueError):
    """A source without a single usable entry, or with broken metadata."""


class StoreError(UserError, ValueError):
    """A store that is damaged, or differs from what is asked for. The message says in what."""


class NoiseKeyError(UserError, ValueError):
    """A key file that can't be used. The message never holds the key."""


class RegisterError(UserError, RuntimeError):
    """A register of observations that is lost, or can't be read or written."""


class LockedError(UserError, RuntimeError):
    """A folder that another run writes. The message names its host, its process, and since when."""


class ModelError(UserError, ValueError):
    """A model that is missing, damaged, or not SDXL."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that is missing, damaged, or of another run."""


class InterchangeError(UserError, ValueError):
    """A LoRA or UNet file that can't be read or converted whole."""


class HubError(UserError, RuntimeError):
    """An upload that can't be made, or failed."""


class StageError(UserError, ValueError):
    """A stage of the evaluation that can't go on with what it was given."""


class ProbeError(UserError, ValueError):
    """Pictures that can't be looked at in memory, or several processes where one is meant."""


class PreviewError(UserError, ValueError):
    """A preview that is damaged, or differs from what is asked for."""


class PrivacyError(UserError, ValueError):
    """Images or a file that the privacy assessment can't use."""


class AnnotateError(UserError, ValueError):
    """Sets that can't be compared, or a folder that can't be written."""


class TrainingError(UserError, RuntimeError):
    """Training that can't go on, since gradients aren't finite in step after step. Checkpoints stay."""


# Of Python's and the libraries' own workings, of which a user can make nothing.
_INTERNAL = (AssertionError, AttributeError, IndexError, NameError, OverflowError, RecursionError, ZeroDivisionError)
_INTERNAL_WORDS = re.compile(
    "infer state dict type|meta tensor|size of tensor|invalid for input of size|unsupported operand|has no attribute"
    "|not subscriptable|out of range|object is not|object cannot be|must be a mapping|too many values|values to unpack"
    "|must match the size|0-d tensor|only one element tensor|Size of label|low_cpu_mem_usage"
    "|shapes cannot be multiplied|can't convert|not supported between|NoneType|size mismatch for"
)
_CONTENT = "its content is not what it should be"


def one_line(error: BaseException, most: int | None = 300) -> str:
    """An error's message on one line of at most ``most`` characters, or its class's name where it has none.

    What a library says of its own workings (``list index out of range``) is put in words; the name of a key that is missing
    is kept.
    """
    words = " ".join(str(error).split())[:most] or type(error).__name__
    if isinstance(error, UserError):
        return words
    if type(error) is KeyError:
        return f"{words} is missing"
    internal = type(error) in _INTERNAL or not isinstance(error, OSError) and _INTERNAL_WORDS.search(words)
    return _CONTENT if internal else words


def print_error(prog: str, error: BaseException) -> None:
    """The one line on stderr that a command ends with."""
    print(f"{prog}: error: {one_line(error, most=None)}", file=sys.stderr)


class Terminated(BaseException):
    """SIGTERM, as an exception: what is half written is removed on its way out."""


def run_command(
    prog: str, function: Callable[[], int | None], *, also: tuple[type[Exception], ...] = (), quiet: bool = False
) -> int:
    """Call ``function`` and return its exit code, 0 for None.

    UserError, OSError, a tensor file that can't be written and those in ``also`` become one line on stderr and exit code 2;
    SIGTERM and Ctrl-C one line and 143 or 130. ``quiet``: without the line, for all processes of a command but one.
    """
    try:
        with _terminable():
            return function() or 0
    except (Terminated, KeyboardInterrupt) as reason:
        name, code = ("SIGTERM", 143) if isinstance(reason, Terminated) else ("SIGINT", 130)
        if not quiet:
            print(f"{prog}: stopped by {name}. What was finished is kept; the same command goes on", file=sys.stderr)
        return code
    except Exception as error:
        if not isinstance(error, (UserError, OSError, *also, *_full_disk())):
            raise
        if not quiet:
            print_error(prog, error)
        return 2


def _full_disk() -> tuple[type[Exception], ...]:
    """What safetensors raises in place of an OSError."""
    module = sys.modules.get("safetensors")  # where it was never imported, it raised nothing
    return (module.SafetensorError,) if module is not None else ()


@contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM raises Terminated, unless something else handles it already."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
