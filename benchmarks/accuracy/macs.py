"""What one more image costs, counted on the model as it runs."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vpdeploy_train.prompted import PromptedViT


@torch.no_grad()
def count_macs(model: PromptedViT, image_size: int) -> int:
    """Count the multiply-accumulates of the second image of a batch of two.

    What does not depend on the images (the projection of static prompts) drops out: deployment computes it once.
    """
    model.eval()
    device = model.head.weight.device
    counts = []
    for batch in (1, 2):
        pixels = torch.zeros(batch, 3, image_size, image_size, device=device)
        # The plain kernel is made of matrix products that the counter knows; the fused ones are not all counted.
        with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
            model(pixels)
        counts.append(counter.get_total_flops() // 2)
    return counts[1] - counts[0]
