"""What a run shows while it goes on: a progress bar, or lines where no one watches."""

from typing import Any

from jaxbnb.core.extras import import_extra
from jaxbnb.core.units import format_seconds

# Lines of steps in a run that no terminal shows.
_LINES = 20


class Display:
    """Shows a run's steps on stderr.

    Args:
        total: number of steps in the run.
        done: number of steps that were taken before.
        is_quiet: show nothing.
    """

    def __init__(self, total: int, done: int, *, is_quiet: bool = False):
        import_extra("rich", needed_by="jaxbnb.finetune.train", extra="finetune")
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False, quiet=is_quiet)
        self._total = total
        self._bar: Any = None
        self._task: Any = None
        if self._console.is_terminal and not is_quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "training", total=total, completed=done, note="compiling"
            )
            self._bar.start()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def step(self, number: int, note: str, seconds_left: float) -> None:
        """Shows a step: in the bar, or about every twentieth as a line."""
        if self._bar is not None:
            self._bar.update(self._task, completed=number, note=note)
            return
        every = max(1, self._total // _LINES)
        if number == 1 or number % every == 0 or number == self._total:
            left = f"  {format_seconds(seconds_left)} left"
            is_last = number == self._total
            self.say(f"step {number}/{self._total}  {note}{'' if is_last else left}")

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
