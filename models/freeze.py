"""--freeze: parts of a backbone that a run leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from utils.errors import UserError

WHOLE, STEM = "backbone", "stem"
# The stem is what comes before the first of these: the stages or blocks of the backbones that models/ knows.
_BODIES = ("layer1", "bottlenecks", "body", "blocks", "layers", "stages")


def list_parts(backbone: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of each part that --freeze names: the direct children, `stem`, and `backbone` for all of it.

    The stem has the siblings before the first of _BODIES. A backbone without any has no such part.
    """
    children, siblings = dict(backbone.named_children()), dict(_holder(backbone).named_children())
    body = next((number for number, name in enumerate(siblings) if name in _BODIES), 0)
    stem = {STEM: list(siblings.values())[:body]} if body else {}
    return {**stem, **{name: [child] for name, child in children.items() if name not in stem}, WHOLE: [backbone]}


def _holder(backbone: nn.Module) -> nn.Module:
    """The module that has the stages: the backbone, or a network of another library within it."""
    return next((module for module in (backbone, *backbone.children())
                 if any(name in _BODIES for name in list(dict(module.named_children()))[1:])), backbone)


def freeze(backbone: nn.Module, names: Sequence[str]) -> tuple[nn.Module, ...]:
    """Let the parameters of these parts have no gradient. Returns their modules, which must also stay in eval mode:
    then BatchNorm neither uses nor changes the statistics of a batch.

    names: of `list_parts`, or of modules within them such as layer3.0. With the stem, parameters beside it are
    frozen too, such as a ViT's positions. Raises UserError for a name that the backbone does not have.
    """
    parts, modules = list_parts(backbone), dict(backbone.named_modules())
    frozen: list[nn.Module] = []
    for name in names:
        found = parts.get(name) or ([modules[name]] if name in modules else [])
        if not found:
            raise UserError(f"--freeze {','.join(names)}: the backbone has no {name}; its parts are "
                            f"{', '.join(parts)}, and modules within them such as "
                            + next(name for name in modules if "." in name))
        frozen += found
        own = _holder(backbone).parameters(recurse=False) if name == STEM else ()
        for parameter in [*own, *(parameter for module in found for parameter in module.parameters())]:
            parameter.requires_grad_(False)
    return tuple(frozen)
