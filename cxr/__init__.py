"""cxr: train, tune and apply chest X-ray models on a Ray cluster, or use them from Python without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cxr.inference.predictor import Predictor as Predictor
    from cxr.inference.predictor import load as load

__version__ = "0.1.0"
__all__ = ["Predictor", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import the Python API when it is first used: it needs torch, which takes seconds to import."""
    if name in ("Predictor", "load"):
        from cxr.inference import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names for tab completion, with those that have not been imported yet."""
    return sorted({*globals(), *__all__})
