"""What several test files do."""

import contextlib
import os
import pkgutil
import resource
import signal
import time
from pathlib import Path
from unittest import mock

from utils.program import interrupt

TOY_EXPERTS = Path("ImageFolder/ConvNetD1W4")  # the toy's experts in a --buffer_path
TOY_RUN = Path("ImageFolder/2/ConvNetD1W4/run")  # its distillation of --run_name=run in a --log_path


def check_refusal(done, *phrases):
    """Asserts that stderr, apart from notes, is one line with the script's name and every phrase."""
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    script = next(argument for argument in done.args if argument.endswith(".py"))
    assert line.startswith(f"{os.path.basename(script)}: error: ")
    for phrase in phrases:
        assert phrase in line, line


def stop_at(name, call_number, at_once=False):
    """Patches a function so that its call of that number (from 1) sends a SIGINT, like Ctrl-C.

    Args:
        name: with the module, as for `mock.patch`.
        at_once: send a second one, too, which stops at once.
    """
    original, calls = pkgutil.resolve_name(name), []

    def counted(*arguments, **options):
        calls.append(1)
        for _ in range((1 + at_once) if len(calls) == call_number else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)
    return mock.patch(name, counted)


def tensors_in(folder):
    """The contents of every .pt, .jsonl and .safetensors file below a folder, by name, except checkpoints."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
             if path.suffix in (".pt", ".jsonl", ".safetensors") and path.name != "checkpoint.pt"}  # that has times
    assert found
    return found


def wait_for(ready, process=None, seconds=300):
    """Waits until `ready()` is true; fails if a process ends before, or at a deadline."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"not ready after {seconds} s"
        time.sleep(0.01)


@contextlib.contextmanager
def full_disk(size):
    """Inside, no file can grow beyond `size` bytes; to a writer, that looks like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def handlers_as_before():
    """Restores the handlers of signals at its end."""
    handlers = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
