"""Import transformers as if what a decoder of text does not need were not installed: a quarter of the time, and more.

Where they are installed, transformers imports scikit-learn and SciPy for a way of drafting and for detecting objects,
and Pillow, torchvision and pandas with these. It asks once whether each is there and keeps the answer. So this is for
processes of our own, not for those that import `LLM` and may have other uses for transformers.
"""

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NOT_NEEDED = ("PIL", "pandas", "scipy", "sklearn", "torchvision")


def import_transformers() -> None:
    """Import its models' base and their registry. What was hidden meanwhile can be imported afterwards."""
    with _hidden(_NOT_NEEDED), _no_map_of_distributions():
        from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401


@contextmanager
def _hidden(packages: tuple[str, ...]) -> Iterator[None]:
    """To Python, None among its modules means that there is no such module."""
    absent = [name for name in packages if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def _no_map_of_distributions() -> Iterator[None]:
    """transformers 5.17 looks at each file of all that is installed, for packages named unlike their distribution.

    Without that map it takes them to be named alike, and imports what it does not find so.
    """
    map_of_distributions = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = dict
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = map_of_distributions
