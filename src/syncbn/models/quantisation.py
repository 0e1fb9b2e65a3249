"""Which layers torch.ao.quantization passed over, because they were not of torch's classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn


def without_observers(model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> list[str]:
    """The names of those of ``layers`` of ``model``, prepared for quantisation, that it cannot do.

    It prepares a layer to be quantised if it knows its class, and quantises it if it knows its
    class, which is another one by then.
    """
    if not any("activation_post_process" in module._modules for module in model.modules()):
        return []
    from torch.ao.quantization import get_default_static_quant_module_mappings  # imported by then

    quantised = get_default_static_quant_module_mappings()
    fused = [module for module in model.modules() if type(module) in quantised]
    absorbed = {child for module in fused for child in module.modules() if child is not module}
    return [
        name or "the module itself"
        for name, layer in layers
        if type(layer) in quantised
        and layer not in absorbed
        and getattr(layer, "qconfig", None) is not None
        and "activation_post_process" not in layer._modules
    ]
