"""What a prompt set weighs: parameters, bytes, and multiply-accumulates when it is deployed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from vpdeploy_train.cost import ViTShape, macs_as_prefix, macs_of_generator
from vpdeploy_train.methods.kept import PrunableMethod
from vpdeploy_train.methods.method import PromptMethod
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.trunks import Trunk


def paper_parameters(method: PromptMethod) -> int:
    """Return the papers' count of a method's prompts: trained numbers, less those of pruned segments."""
    return int(method.summary()["parameters"])


def tuned_percent(model: PromptedViT, vit: nn.Module) -> float:
    """Return the papers' "tuned / total": prompts, less pruned ones, and head over backbone and head, in percent.

    Args:
        model: The model.
        vit: Its backbone as it was before the method; the model's own may have further weights.
    """
    head = sum(parameter.numel() for parameter in model.head.parameters())
    backbone = sum(parameter.numel() for parameter in vit.parameters())
    return 100 * (paper_parameters(model.method) + head) / (backbone + head)


def prompt_bytes(model: PromptedViT) -> int:
    """Return the bytes of the prompt tensors that a run stores, without the head."""
    return sum(value.nbytes for value in model.method.state_dict().values())


def count_macs(model: PromptedViT) -> int | None:
    """Count one image of the deployed model, whose static prompts are compiled beforehand.

    Returns:
        None where it is not counted: blocks of several sizes, or a feature that averages over prompt rows.
    """
    shape = shape_of(model.trunk, model.head.out_features)
    if shape is None or model.pools_prompts:
        return None
    class_token_only = model.trunk.reads_class_token_only
    method = model.method
    inserted = method.inserted()
    if inserted is not None:
        rows = len(inserted)
        shape = replace(shape, tokens=shape.tokens + rows, extra_rows=shape.extra_rows + rows)
    if not isinstance(method, PrunableMethod):
        return macs_as_prefix(shape, [0] * shape.depth, class_token_only=class_token_only)
    total = macs_as_prefix(shape, method.kept.columns, class_token_only=class_token_only)
    if method.form == "adaptive":
        hidden = len(method.kept.hidden)
        total += sum(macs_of_generator(shape, tokens=len(block), hidden=hidden) for block in method.kept.tokens[1:])
    return total


def shape_of(trunk: Trunk, classes: int) -> ViTShape | None:
    """Return the sizes of a backbone whose blocks are all of one size, else None."""
    if trunk.grid is None or len(trunk.stages) > 1:
        return None
    width = trunk.stages[0].width
    mlp = trunk.blocks[0].get_submodule("mlp")
    weights = [module.weight.numel() for module in mlp.modules() if isinstance(module, nn.Linear)]
    patches = trunk.grid**2
    model: Any = trunk.model
    extra_rows = int(model.num_prefix_tokens)
    return ViTShape(
        depth=len(trunk.blocks),
        width=width,
        hidden=sum(weights) // (2 * width),
        tokens=extra_rows + patches,
        patch_values=3 * trunk.patch_size**2,
        classes=classes,
        extra_rows=extra_rows,
    )
