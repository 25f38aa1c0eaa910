"""SSCD's network: ResNet-50, generalised-mean pooling, a linear map to 512 dimensions, L2 norm.

Pizzi et al. 2022, *A Self-Supervised Descriptor for Image Copy Detection* (arXiv 2202.10261), §4. The backbone is He
et al. 2016 (arXiv 1512.03385) with the stride in the 3×3 convolution. Weights come from safetensors in either
published naming: torchvision's (``backbone.layer1.0.conv1.weight``) or Classy Vision's
(``backbone.blocks.0.block0-0.convolutional_block.0.weight``).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from sdxl_ambient.models.finite import check_finite

_DEPTHS = (3, 4, 6, 3)
_POOLING_POWER = 3.0


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride), 1×1 convolutions beside a shortcut; (n, c, h, w) → (n, 4·width, h/stride,
    w/stride).
    """

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or channels != 4 * width:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


class SSCD(nn.Module):
    """(n, 3, h, w), ImageNet-normalised → (n, 512), of unit length."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, depth in enumerate(_DEPTHS):
            width = 64 * 2**stage
            blocks = []
            for block in range(depth):
                blocks.append(Bottleneck(channels, width, 2 if stage > 0 and block == 0 else 1))
                channels = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return F.normalize(self.fc(generalised_mean(x)))


def generalised_mean(x: torch.Tensor, power: float = _POOLING_POWER) -> torch.Tensor:
    """GeM pooling, (mean x^p)^(1/p) over positions: (n, c, h, w) → (n, c) (Radenović et al. 2018, arXiv 1711.02512,
    eq. 3).
    """
    return x.clamp(min=1e-6).pow(power).mean((2, 3)).pow(1 / power)


def load_sscd(path: str | Path) -> SSCD:
    """SSCD with the weights of a .safetensors file, ready for inference.

    Raises:
        ValueError: the file's tensors are not those of SSCD's ResNet-50, or not finite.
    """
    state = {}
    for name, tensor in load_file(str(path)).items():
        if not name.endswith("num_batches_tracked"):
            state[_torchvision_name(name)] = tensor.float()
    model = SSCD()
    wanted = {n: t.shape for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    wrong = sorted(n for n in wanted.keys() | state.keys() if n not in state or wanted.get(n) != state[n].shape)
    if wrong:
        raise ValueError(f"not SSCD's ResNet-50 with 512 dimensions: {len(wrong)} tensors differ, the first is {wrong[0]!r}")
    check_finite(state, f"SSCD's weights in {path}")
    model.load_state_dict(state, strict=False)  # strict but for the counters, checked above
    return model.eval()


# Classy Vision numbers the layers of a block's Sequential: convolutions 0, 3, 6, norms 1, 4, and the last norm apart
# as "bn".
_IN_BLOCK = {
    "convolutional_block.0": "conv1",
    "convolutional_block.1": "bn1",
    "convolutional_block.3": "conv2",
    "convolutional_block.4": "bn2",
    "convolutional_block.6": "conv3",
    "bn": "bn3",
    "downsample.0": "downsample.0",
    "downsample.1": "downsample.1",
}
_OUTSIDE = {"initial_block._module.0": "conv1", "initial_block._module.1": "bn1", "embeddings.1": "fc"}
_BLOCK = re.compile(r"blocks\.(\d+)\.block\d+-(\d+)\.(?:_module\.)?(.+)")


def _torchvision_name(name: str) -> str:
    """A published tensor name in torchvision's naming, without its prefix. Unknown names come back as they are."""
    stem, _, leaf = name.removeprefix("backbone.").rpartition(".")
    if match := _BLOCK.fullmatch(stem):
        stage, block, inner = match.groups()
        return f"layer{int(stage) + 1}.{block}.{_IN_BLOCK.get(inner, inner)}.{leaf}"
    return f"{_OUTSIDE.get(stem, stem)}.{leaf}"
