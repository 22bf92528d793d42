"""The stack of layers of a Transformers model: what lies before it, in it, after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


_HEADLESS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


def stacks_of(model: PreTrainedModel) -> list[nn.ModuleList]:
    """Return every stack of layers from below: an encoder's, then a decoder's that reads it; most models have one.

    Of the lists of modules that are in no other list, each is the longest of its part of the model.
    """
    base = model.base_model
    parts = [part for name in ("encoder", "decoder") if (part := getattr(base, name, None)) is not None]
    found = [max(lists, key=len) for part in parts if (lists := list(_lists(part)))]
    return found or [max(_lists(base), key=len)]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the stack of layers; of an encoder with a decoder the decoder's, which is what a head reads."""
    return stacks_of(model)[-1]


def _lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Yield the lists of modules that are in no other list; a layer may be made of one, too."""
    from torch import nn

    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _lists(child)


def heads_of(model: PreTrainedModel, task: str) -> list[nn.Module]:
    """Return the modules beside the backbone; a language model's output matrix, often its embedding, is none of them.

    Args:
        model: With its head.
        task: PEFT's name of the task.
    """
    if task in _HEADLESS:
        return []
    return [child for child in model.children() if child is not model.base_model]


def before(model: PreTrainedModel, layers: nn.ModuleList) -> list[nn.Module]:
    """Return the modules of the backbone that feed its layers: the embeddings."""
    from torch import nn

    children, place = _children(model, layers)
    return [*children[:place], *(child for child in children[place + 1 :] if isinstance(child, nn.Embedding))]


def after(model: PreTrainedModel, layers: nn.ModuleList) -> list[nn.Module]:
    """Return the modules of the backbone that it defines after its layers: a final norm, a pooler."""
    from torch import nn

    children, place = _children(model, layers)
    return [child for child in children[place + 1 :] if not isinstance(child, nn.Embedding)]


def depths_of(model: PreTrainedModel, task: str) -> dict[str, int]:
    """Return how many layers down each parameter lies, by name.

    That is 0 for the head and what comes after the layers, 1 for the top layer; embeddings lie lowest. A decoder's layers
    lie above those of the encoder it reads. A language model's output matrix is part of the head unless it is the
    embedding.
    """
    stacks = stacks_of(model)
    layers = [layer for stack in stacks for layer in stack]
    heights = {id(p): number for number, layer in enumerate(layers, start=1) for p in layer.parameters()}
    top = [*after(model, stacks[-1]), *heads_of(model, task)]
    if len(stacks) > 1:
        heights |= {id(p): len(stacks[0]) for module in _closing(model, stacks[0]) for p in module.parameters()}
        top += _closing(model, stacks[-1])
    output = model.get_output_embeddings()
    is_embedding = output is not None and output.weight is model.get_input_embeddings().weight
    if output is not None and not is_embedding:
        top.append(output)
    heights |= {id(p): len(layers) + 1 for module in top for p in module.parameters()}
    if is_embedding:
        heights.pop(id(output.weight), None)
    # what lies in no layer and not above them is an embedding
    return {name: len(layers) + 1 - heights.get(id(p), 0) for name, p in model.named_parameters()}


def _closing(model: PreTrainedModel, layers: nn.ModuleList) -> list[nn.Module]:
    """Return what an encoder or a decoder itself does after its layers; what prepares embeddings is called so."""
    parent = next(module for module in model.modules() if any(child is layers for child in module.children()))
    names, children = zip(*parent.named_children(), strict=True)
    place = next(number for number, child in enumerate(children) if child is layers)
    return [child for name, child in zip(names[place + 1 :], children[place + 1 :], strict=True) if "embed" not in name]


def _children(model: PreTrainedModel, layers: nn.ModuleList) -> tuple[list[nn.Module], int]:
    children = list(model.base_model.children())
    place = next(number for number, child in enumerate(children) if any(m is layers for m in child.modules()))
    return children, place


@contextlib.contextmanager
def skipped(layers: Iterable[nn.Module], states: torch.Tensor | None = None) -> Iterator[None]:
    """While inside, layers compute nothing: the first gives `states`, the others, or all, what they are given.

    Args:
        layers: Neighbours in the stack, each of which maps hidden states to hidden states.
        states: Hidden states of the shape the model expects there.
    """

    def give(hidden_states: Any, *_: Any, **__: Any) -> Any:
        return states

    def pass_on(hidden_states: Any, *_: Any, **__: Any) -> Any:
        return hidden_states

    replaced = [(layer, vars(layer).get("forward")) for layer in layers]
    for number, (layer, _) in enumerate(replaced):
        layer.forward = give if states is not None and number == 0 else pass_on
    try:
        yield
    finally:
        for layer, forward in replaced:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


@contextlib.contextmanager
def output_of(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """While inside, collect what a layer gives."""
    found: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _given, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()
