"""What was taken from a model before it was trained, and what that saves, in words."""

from __future__ import annotations

from typing import Any

from tune_magic.view import words

_BYTES_A_PARAMETER = 4  # float32, as exports write it
_SIZES = {
    "num_hidden_layers": "layers", "intermediate_size": "neurons a layer", "num_attention_heads": "query heads",
    "num_key_value_heads": "key-value heads",
}  # fmt: skip


def compressed(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of what `compress` did; nothing where it did nothing."""
    found = plan.get("compress")
    if found is None:
        return []
    before, after, options = found["before"], found["after"], plan["recipe"]["compress"]
    changed = [
        f"{title} {before[key]} → {after[key]}"
        for key, title in _SIZES.items()
        if key in before and before[key] != after.get(key)
    ]
    return [
        ("compressed", ", ".join([*changed, *_bound(options, after), _parameters(before, after)])),
        ("its size", _size(after)),
    ]


def _bound(options: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Say how weights are bound."""
    parts = []
    if options["prune_weights"]:
        by = ", by Wanda" if options["prune_by"] == "wanda" else ""
        parts.append(f"{100 * after['zeros'] / after['distinct']:.0f} % of all weights zero for good{by}")
    if options["share_weights"] is not None:
        parts.append(f"{options['share_weights']} values a matrix")
    if options["tie_layers"] is not None:
        parts.append(f"{options['tie_layers']} neighbouring layers with the same weights")
    if options["quantize_aware"] != "none":
        parts.append(f"trained as it is after rounding to {options['quantize_aware']}")
    return parts


def _parameters(before: dict[str, Any], after: dict[str, Any]) -> str:
    counts = [words.count(found) for found in (before["parameters"], after["distinct"])]
    if before["parameters"] == after["distinct"]:
        return f"{counts[0]} parameters"
    return f"parameters {counts[0]} → {counts[1]}"


def _size(after: dict[str, Any]) -> str:
    """Say what files take, and what they could: most formats hold every weight, whatever it is."""
    whole = _BYTES_A_PARAMETER * after["parameters"]
    if after["packed_bytes"] >= whole:
        return f"{words.size(whole)} in float32"
    bits = 8 * after["packed_bytes"] / after["parameters"]
    return (
        f"{words.size(whole)} in float32, since files hold every weight; about {words.size(after['packed_bytes'])} "
        f"({bits:.1f} bits a weight) in a format that stores what is the same once"
    )
