"""Models whose calls cannot be seen, because they run as one compiled piece."""

import torch
from torch import nn

from vision_attn.errors import AttentionNotFoundError


def uncompiled(model: nn.Module) -> nn.Module:
    """Returns the original of a model that `torch.compile` wrapped, and any other model as it is.

    Raises:
        AttentionNotFoundError: parts of the model are compiled, so that their calls cannot be seen. The message names
            the part and what to do.
    """
    while isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
        model = original
    for name, module in model.named_modules():
        remedy = _remedy(module, f"model.{name}" if name else "model")
        if remedy:
            raise AttentionNotFoundError(f"expected a model that runs call by call, got compiled parts: {remedy}")
    return model


def _remedy(module: nn.Module, path: str) -> str | None:
    """Returns what to do about a module that is compiled, or None where it is not."""
    if isinstance(getattr(module, "_orig_mod", None), nn.Module):
        return f"{path} went through torch.compile, put its original back with {path} = {path}._orig_mod"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return f"{path} was compiled by its compile(), undo it with {path}._compiled_call_impl = None"
    if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
        return f"the forward of {path} went through torch.compile, undo it with del {path}.forward"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{path} is a TorchScript module, load the Python model that it was made from"
    return None
