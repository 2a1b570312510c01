"""Figures to files, without matplotlib's global state. matplotlib is optional: the extra `plot` brings it."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivllm.errors import StartupError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by everybody
_STYLE: Any = {"svg.hashsalt": "minivllm", "svg.fonttype": "none", "font.size": 9.0, "axes.titlesize": 10.0}


def require_matplotlib() -> None:
    """Raise `StartupError` with what to install; call it before work that a missing plot would waste."""
    if find_spec("matplotlib") is None:
        raise StartupError("plots need matplotlib: pip install 'mini-vllm[plot]' (or pip install matplotlib)")


def new_figure(num_plots: int = 1, width: float = 8.0, height: float = 3.6) -> "tuple[Figure, list[Axes]]":
    """A figure and its `num_plots` axes, one below the other, each `height` inches. Raises `StartupError`."""
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height * num_plots), layout="constrained")
        axes = figure.subplots(num_plots, squeeze=False)[:, 0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    return figure, list(axes)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write `figure` as `path`'s suffix says (.svg, .png); equal figures give equal files. Raises `StartupError`."""
    import matplotlib as mpl

    metadata: Any = {"Date": None} if path.suffix == ".svg" else {}
    try:
        with mpl.rc_context(_STYLE):
            figure.savefig(path, dpi=110, metadata=metadata, facecolor="white")
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot write the plot {path}: {error}") from error
