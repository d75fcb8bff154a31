"""Which layer gets which scheme: the rules of a run applied to the layers of a model, and what vLLM will fuse."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from calibrate.config import CalibrationConfig, parse_scheme
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer

# vLLM makes one layer of each of these.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_STOCK_ASYMMETRIC_BITS = (4, 8)  # of vLLM before 0.33


def assign_schemes(
    config: CalibrationConfig, inside: Sequence[str], outside: Sequence[str]
) -> tuple[dict[str, QuantScheme], list[str]]:
    """The scheme of every layer that is quantized, in the order of the model, and the problems of the rules.

    Args:
        inside: full names of the linear layers in the decoder blocks, which get the run's scheme by default.
        outside: of the other linear layers and the embedding, which are quantized only by a rule of their own.
    """
    schemes: dict[str, QuantScheme | None] = {}
    problems = []
    names = [*inside, *outside]
    for pattern, scheme_name in config.rules:
        try:
            matched = match_layers(pattern, names)
        except re.error as error:
            problems.append(f"{pattern!r} is not a regular expression: {error}")
            continue
        if not matched:
            problems.append(f"{pattern!r} matches no layer; names look like {names[0]}")
        elif not (fresh := [name for name in matched if name not in schemes]):
            problems.append(
                f"{pattern!r} has no effect: earlier rules match all of its {len(matched)} layers; move it up"
            )
        else:
            schemes |= dict.fromkeys(fresh, parse_scheme(scheme_name))
    default = parse_scheme(config.scheme, config.group_size)
    chosen = {name: schemes.get(name, default) for name in inside} | {name: schemes.get(name) for name in outside}
    return {name: scheme for name, scheme in chosen.items() if scheme is not None}, problems


def match_layers(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern stands for: itself, or as a regular expression (see `CalibrationConfig.layers`).

    Raises:
        re.error: it is none.
    """
    names = list(names)
    if pattern in names:
        return [pattern]
    find = re.compile(pattern.removeprefix("re:"))
    return [name for name in names if (find.match(name) if pattern.startswith("re:") else find.search(name))]


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The layers among ``names`` that vLLM fuses, group by group; every other layer is a group of its own."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        fused = next((members[0] for members in _FUSED if leaf in members), leaf)
        groups.setdefault((parent, fused), []).append(name)
    return list(groups.values())


def stock_problems(schemes: Mapping[str, QuantScheme], linears: Iterable[str]) -> list[str]:
    """What vLLM without our plugin refuses or gets wrong, each with the way out."""
    problems = []
    for group in fused_groups(linears):
        of = {name.rpartition(".")[2]: schemes.get(name) for name in group}
        if len(set(of.values())) > 1:
            parent = group[0].rpartition(".")[0]
            listing = ", ".join(f"{leaf}: {scheme or 'not quantized'}" for leaf, scheme in of.items())
            rule = f"re:{re.escape(parent)}[.]({'|'.join(of)})$=SCHEME"
            problems.append(
                f"{parent}: stock vLLM fuses {', '.join(of)} into one layer and needs one scheme for it, but there are "
                f"several ({listing}); give them one with --layer {rule!r}, or leave --stock-vllm out and serve with "
                "the plugin"
            )
    asymmetric = {
        scheme.weights.bits
        for scheme in schemes.values()
        if isinstance(scheme.weights, Integer) and not scheme.weights.symmetric
    }
    if odd := sorted(asymmetric - set(_STOCK_ASYMMETRIC_BITS)):
        problems.append(
            f"stock vLLM before 0.33 has no asymmetric weights of {', '.join(map(str, odd))} bits; use a symmetric "
            "scheme, or leave --stock-vllm out and serve with the plugin"
        )
    return problems
