"""Layers compiled for training alone: when answers are generated, every step would be compiled anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn


class CompiledLayers:
    """The layers of a model with their compiled forms, made when they are first called, for rows of any size."""

    def __init__(self, layers: Iterable[nn.Module] = ()) -> None:
        self._layers = []
        for layer in layers:
            layer.compile(dynamic=True)
            self._layers.append((layer, layer._compiled_call_impl))
            layer._compiled_call_impl = None

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """While inside, calling a layer calls its compiled form."""
        for layer, call in self._layers:
            layer._compiled_call_impl = call
        try:
            yield
        finally:
            for layer, _ in self._layers:
                layer._compiled_call_impl = None
