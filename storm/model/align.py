"""What image and expression of a profile have in common: a unit vector of each, before space has had a part.

In: the image feature of the window around a profile, and the content of its expression. Out: unit vectors that the
loss term `align` brings together, and the scale of their products. Footprint, position, depth, platform and panel are
in neither: two profiles that agree in these alone are not alike here.
Shapes: R regions, N profiles, A align width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storm.model.heads import soft_clamp
from storm.model.layers import Constant
from storm.presets import ModelConfig

MIDDLE = math.log(10)  # of the log scale, which stays between 0 and twice this: products are multiplied by 1 to 100


class Align(nn.Module):
    """Two projections without biases, and a learned bounded scale."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image = nn.Linear(config.image_width, config.align_width, bias=False)
        self.expression = nn.Linear(config.fusion_width, config.align_width, bias=False)
        self.log_scale = Constant(1, 1)

    def forward(self, window_RND: Tensor, content_RND: Tensor) -> dict[str, Tensor]:
        """`align_image` and `align_expression` [R, N, A], and `align_scale` []."""
        log_scale = self.log_scale(torch.zeros(1, dtype=torch.int64, device=window_RND.device))
        return {
            "align_image": F.normalize(self.image(window_RND), dim=-1, eps=1e-6),
            "align_expression": F.normalize(self.expression(content_RND), dim=-1, eps=1e-6),
            "align_scale": (MIDDLE + soft_clamp(log_scale, MIDDLE)).exp().squeeze(),
        }
