"""STORM: a hierarchical transformer for tissue, pretrained on H&E morphology, gene expression and space.

`storm.load(folder)` opens an exported model; `storm.embed` and `storm.predict` apply one and return AnnData.
They are looked up at first use: importing `storm`, or its base modules, leaves torch unloaded.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {"load": "storm.export", "embed": "storm.results", "predict": "storm.results"}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'storm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
