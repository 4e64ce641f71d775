"""A progress bar with the key numbers, the speed and the time left; plain lines where there is no terminal."""

import contextlib
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import TYPE_CHECKING

from tqdm import tqdm

from utils.errors import columns_of, wrapped
from utils.program import ranks
from utils.program.console import duration, short_count

if TYPE_CHECKING:
    import torch

PLAIN_SECONDS = 30.0  # between two lines where there is no terminal
MARKS, MARK_SECONDS = 60, 1.0  # the pace is measured over the last 60 marks, at least a second apart
SURE_STEPS, SURE_SECONDS = 3, 5.0  # either of which makes the pace reliable enough to predict the time left
WORTH_SAYING = 60.0  # seconds left, below which the prediction is not printed
WORTH_SHOWING = 3.0  # seconds after which a bar of `watched` appears


class Pace:
    """How long a step takes, measured over the latest ones.

    The first step, which allocates and compiles, does not count, nor does time inside `pause`.
    """

    def __init__(self) -> None:
        self._paused = 0.0
        self._paused_at: float | None = None
        self._marks: deque[tuple[float, float]] = deque(maxlen=MARKS)  # (time, steps done)
        self._last = (0.0, 0.0)

    def reached(self, done: float) -> None:
        """Records that `done` steps, possibly fractional, are done in all."""
        self._last = perf_counter() - self._paused, done
        if not self._marks or self._last[0] - self._marks[-1][0] >= MARK_SECONDS:
            self._marks.append(self._last)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        self._paused_at = perf_counter()
        try:
            yield
        finally:
            self._paused += self.paused_for
            self._paused_at = None

    @property
    def paused_for(self) -> float:
        """Seconds since the current pause began; 0 outside one."""
        return 0.0 if self._paused_at is None else perf_counter() - self._paused_at

    def _measured(self) -> tuple[float, float]:
        """Seconds measured, and the steps done in them."""
        began, done_before = self._marks[0] if self._marks else self._last
        return self._last[0] - began, self._last[1] - done_before

    @property
    def seconds(self) -> float | None:
        """Seconds per step; None while unknown."""
        seconds, steps = self._measured()
        return seconds / steps if steps > 0 else None

    @property
    def sure(self) -> bool:
        """Whether the pace was measured for long enough to be reliable."""
        seconds, steps = self._measured()
        return steps > 0 and (steps >= SURE_STEPS or seconds >= SURE_SECONDS)


class Progress(tqdm):
    """A bar cut to the terminal's width; without a terminal, a plain line every half minute and a last one.

    After a few steps, prints the time left, if that is more than a minute, and the peak memory so far.

    Args:
        total: number of steps.
        initial: steps that were done before.
        quiet: show nothing.
        images: images per step, to show images per second.
        later: seconds of work beyond the remaining steps.
        device: the device whose memory is reported.
        delay: seconds before the bar appears; one that ends earlier is never shown.
    """

    disable, _terminal = True, False  # until `__init__` is done

    def __init__(self, total: float, description: str, *, initial: float = 0, quiet: bool = False, images: float = 0,
                 later: Callable[[], float] = lambda: 0.0, device: "torch.device | None" = None, delay: float = 0.0):
        self._terminal = sys.stderr.isatty()
        self.pace = Pace()
        self.count: str | None = None  # shown instead of the number of steps done
        self._images, self._later, self._device = images, later, device
        self.numbers: tuple[str, ...] = ()
        self._aside = ""
        self._said = self._closing = False
        self._last_shown = (initial, "")
        super().__init__(total=total, desc=description, initial=initial, disable=quiet or not ranks.first(),
                         file=sys.stderr, miniters=0, leave=True,
                         mininterval=0.2 if self._terminal else PLAIN_SECONDS, delay=delay,
                         ncols=80, nrows=20)  # tqdm would show nothing on a terminal of size 0; see __str__

    def show(self, *numbers: str) -> None:
        """Sets the numbers of the next line, the most important first."""
        self.numbers = numbers

    def update(self, n: float | None = 1) -> bool | None:
        """Counts `n` more steps, possibly fractional, as done."""
        if self.disable:
            return None
        if n:
            self.pace.reached(self.n + n)
        updated = super().update(n)
        if not self._said and self.pace.sure:
            self._said = True
            if self.seconds_left >= WORTH_SAYING:
                self.say(f"expect about {duration(self.seconds_left)} more{self._memory()}")
        return updated

    def _memory(self) -> str:
        """The peak memory so far, in words."""
        if self._device is None:
            return ""
        from utils.memory import peak  # imports torch, which is already loaded if there is a device

        return f", {peak(self._device) / 1e9:.2g} GB of {'GPU ' * (self._device.type == 'cuda')}memory so far"

    def reach(self, done: float) -> None:
        """Counts steps up to `done` in all, possibly fractional; those already counted do not count again."""
        self.update(max(0, done - self.n))

    @contextlib.contextmanager
    def aside(self, doing: str, steps: int) -> Iterator[Callable[[], None]]:
        """Shows another task, whose time the pace leaves out; yields a callback to call after each of its steps."""
        done = itertools.count(1)

        def after_step() -> None:
            self._aside = f"{doing} {100 * next(done) // max(1, steps)} %"
            self.update(0)

        self._aside = f"{doing} 0 %"
        with self.pace.pause():
            yield after_step
        self._aside = ""

    def say(self, text: str) -> None:
        """Prints a separate line."""
        if not self.disable:
            (self.write if self._terminal else print)(wrapped(text))

    @property
    def seconds_left(self) -> float | None:
        """None while unknown."""
        if self.pace.seconds is None:
            return None
        return max(0.0, self.total - self.n) * self.pace.seconds + self._later()

    def __str__(self) -> str:
        left = self.seconds_left
        ended = self._closing and self.n >= self.total
        time = (f"took {self.format_interval(self.format_dict['elapsed'])}" if ended else
                "?:?? left" if left is None else f"{self.format_interval(left)} left")
        pace = self.pace.seconds
        rate = [f"{short_count(self._images / pace)} images/s"] if self._images and pace else []
        numbers = [time, *([self._aside] if self._aside else []), *self.numbers, *rate]
        count = f"{self.n:.10g}/{self.total}" if self.count is None else self.count
        percent = f"{min(100, int(100 * self.n / self.total)) if self.total else 100} %"
        head, rest = f"{self.desc.removesuffix(': ')} {count}".rstrip(), ", ".join(numbers)
        if not self._terminal:
            return f"{head} {percent}, {rest}"
        return self.format_meter(self.n, self.total, 0, ncols=columns_of(self.fp), ascii=self.ascii, head=head,
                                 percent=percent, rest=rest, bar_format="{head} {percent:>5} |{bar}| {rest}")

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        finished = self._closing and self.initial < self.n >= self.total
        if self._terminal:
            super().display(msg, pos)
        elif self.delay and self._time() < self.start_t + self.delay:
            return
        elif (self.n, self._aside) != self._last_shown or finished:
            print(str(self), file=self.fp, flush=True)
            self._last_shown = (self.n, self._aside)

    def close(self) -> None:
        """Ends the bar, leaving its last line."""
        self._closing = True
        if self._terminal or self.disable:
            return super().close()
        self.display()
        self.disable = True
        self._decr_instances(self)


@contextlib.contextmanager
def watched(what: str, total: float, quiet: bool = False) -> Iterator[Callable[[float], object]]:
    """A bar for a task that is long only with much data; it appears after a few seconds.

    Yields a callback that takes how much more is done.

    Args:
        total: amount of work, in a unit that is not shown.
    """
    with Progress(total, what, quiet=quiet, delay=WORTH_SHOWING) as bar:
        bar.count = ""
        yield bar.update
        bar.reach(total)
