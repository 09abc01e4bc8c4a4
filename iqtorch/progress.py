"""Progress bars: on standard error, and only where somebody sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


def bars(*columns: str | ProgressColumn, show: bool = True, console: Console | None = None) -> Progress:
    """Bars that vanish at the end.

    Args:
        columns: what a bar shows; text stands in rich's markup.
        show: False for none.
        console: where to draw; default: standard error. Files and pipes get nothing.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = console or Console(stderr=True)
    seen = console.is_terminal or console.is_jupyter
    return Progress(*columns, console=console, transient=True, disable=not (show and seen))


def share_bars(label: str, show: bool) -> Progress:
    """Bars of work whose size is known: the label, the share that is done, time left, and what is at hand (the task's description)."""
    from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

    return bars(label, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), "{task.description}", show=show)
