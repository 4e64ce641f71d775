"""Name → network: the ConvNet family and the five classics that dataset distillation is evaluated on.

Parameter names, shapes and order are those of the published code, so published experts load. No activation works in
place, so every network can be differentiated twice, in any float type, and run under `torch.func.functional_call`.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import relu

from utils.errors import UserError
from utils.networks.names import CLASSICS, ConvNetPlan, margin, stride

LEAK = 0.01  # slope of leaky ReLU below zero
NORM_GROUPS = 4  # of group norm

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "leaky": partial(nn.LeakyReLU, negative_slope=LEAK),
}

# (channels, height, width) → layer; only layer norm needs height and width. Instance norm, as published, is a group
# norm with one channel per group.
NORMS: dict[str, Callable[..., nn.Module | None]] = {
    "none": lambda channels, *size: None,
    "batch": lambda channels, *size: nn.BatchNorm2d(channels),
    "layer": lambda channels, *size: nn.LayerNorm([channels, *size]),
    "instance": lambda channels, *size: nn.GroupNorm(channels, channels),
    "group": lambda channels, *size: nn.GroupNorm(NORM_GROUPS, channels),
}

POOLINGS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    "max": partial(nn.MaxPool2d, 2),
    "average": partial(nn.AvgPool2d, 2),
}


class ConvNet(nn.Module):
    """`depth` blocks of [3×3 convolution, norm, activation, 2×2 pooling] and a linear layer; [B, C, H, W] → [B, K].

    The network of Gidaris & Komodakis 2018 (https://arxiv.org/abs/1804.09458) in the variants of Zhao et al. 2021
    (https://arxiv.org/abs/2006.05929). `plan` is the variant, `image_shape` the shape [C, H, W] of its input.

    Raises:
        UserError: the images are too small for this depth of pooling, or group norm gets a width not a multiple of 4.
    """

    def __init__(self, plan: ConvNetPlan, channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.plan, self.image_shape = plan, (channels, *image_size)
        if plan.norm == "group" and plan.width % NORM_GROUPS:
            raise UserError(f"group norm (GN) has four groups; got width {plan.width}, give a multiple of 4")

        paddings = plan.paddings(channels)
        height, width = (side + 2 * paddings[0] - 2 for side in image_size)
        deepest = min(height, width).bit_length() - 1
        if plan.pooling != "none" and plan.depth > deepest:
            raise UserError(
                f"a ConvNet of depth {plan.depth} halves its images {plan.depth} times, and {image_size[0]}×"
                f"{image_size[1]} allows {deepest}; give a smaller depth (D) or no pooling (NP)"
            )

        layers: list[nn.Module | None] = []
        for padding in paddings:
            layers += [
                nn.Conv2d(channels, plan.width, kernel_size=3, padding=padding),
                NORMS[plan.norm](plan.width, height, width),
                ACTIVATIONS[plan.activation](),
                POOLINGS[plan.pooling](),
            ]
            channels = plan.width
            if plan.pooling != "none":
                height, width = height // 2, width // 2
        self.features = nn.Sequential(*(layer for layer in layers if layer is not None))
        self.classifier = nn.Linear(plan.width * height * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class MLP(nn.Module):
    """Three linear layers, 128 units wide, with ReLU; [B, C, H, W] → [B, K], for any C, H, W."""

    def __init__(self, channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(channels * image_size[0] * image_size[1], 128)
        self.fc_2 = nn.Linear(128, 128)
        self.fc_3 = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = relu(self.fc_1(images.flatten(1)))
        return self.fc_3(relu(self.fc_2(hidden)))


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling; [B, C, H, W] → [B, K].

    LeCun et al. 1998, "Gradient-based learning applied to document recognition".
    """

    def __init__(self, channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, kernel_size=5, stride=stride(image_size), padding=margin(channels)),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.fc_1 = nn.Linear(16 * 5 * 5, 120)
        self.fc_2 = nn.Linear(120, 84)
        self.fc_3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = relu(self.fc_1(self.features(images).flatten(1)))
        return self.fc_3(relu(self.fc_2(hidden)))


class AlexNet(nn.Module):
    """Five convolutions and one linear layer, cut down for small images; [B, C, H, W] → [B, K].

    After Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks".
    """

    def __init__(self, channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 128, kernel_size=5, stride=stride(image_size), padding=2 + margin(channels)),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 192, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(192, 256, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 192, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(192, 192, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.fc = nn.Linear(192 * 4 * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).flatten(1))


class VGG11(nn.Module):
    """VGG-11 with a norm after each convolution and one linear layer; [B, C, H, W] → [B, K].

    Simonyan & Zisserman 2015, https://arxiv.org/abs/1409.1556, configuration A.
    """

    PLAN = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")

    def __init__(self, channels: int, num_classes: int, image_size: tuple[int, int], norm: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        padding = 1 + margin(channels)
        for width in self.PLAN:
            if width == "pool":
                layers += [nn.MaxPool2d(2)]
            else:
                convolution = nn.Conv2d(channels, width, kernel_size=3, padding=padding)
                layers += [convolution, NORMS[norm](width), nn.ReLU()]
                channels, padding = width, 1
        # As published: a 64×64 image leaves 2×2 features, of which the 1×1 window keeps the top left.
        layers += [nn.AvgPool2d(kernel_size=1, stride=stride(image_size))]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut; halves the image by a stride of 2, or by average pooling if `pool`."""

    def __init__(self, channels: int, width: int, halve: bool, norm: str, pool: bool) -> None:
        super().__init__()
        stride = 2 if halve and not pool else 1
        halving = [nn.AvgPool2d(2)] if halve and pool else []
        self.conv1 = nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = NORMS[norm](width)  # "bn" whatever the norm: the published parameter names
        self.pool = nn.Sequential(*halving)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = NORMS[norm](width)
        self.shortcut = nn.Sequential()
        if channels != width:
            convolution = nn.Conv2d(channels, width, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, *halving, NORMS[norm](width))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.pool(relu(self.bn1(self.conv1(images))))
        return relu(self.bn2(self.conv2(hidden)) + self.shortcut(images))


class ResNet18(nn.Module):
    """ResNet-18 with a 3×3 stem; [B, C, H, W] → [B, K].

    He et al. 2016, https://arxiv.org/abs/1512.03385. With `pool` (the `_AP` names) the blocks halve by average pooling,
    and the classifier reads the whole last feature map instead of its mean.
    """

    def __init__(
        self, channels: int, num_classes: int, image_size: tuple[int, int], norm: str, pool: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=stride(image_size), padding=1, bias=False)
        self.bn1 = NORMS[norm](64)
        block = partial(BasicBlock, norm=norm, pool=pool)
        self.layer1 = nn.Sequential(block(64, 64, halve=False), block(64, 64, halve=False))
        self.layer2 = nn.Sequential(block(64, 128, halve=True), block(128, 128, halve=False))
        self.layer3 = nn.Sequential(block(128, 256, halve=True), block(256, 256, halve=False))
        self.layer4 = nn.Sequential(block(256, 512, halve=True), block(512, 512, halve=False))
        last = 3 if pool and image_size[0] == 28 else 4  # pooling rounds 7 down to 3, a stride up to 4
        self.head = nn.Sequential() if pool else nn.AvgPool2d(4)
        self.classifier = nn.Linear(512 * last * last if pool else 512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = relu(self.bn1(self.conv1(images)))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        return self.classifier(self.head(hidden).flatten(1))


_MAKERS: dict[str, Callable[..., nn.Module]] = {
    "MLP": MLP,
    "LeNet": LeNet,
    "AlexNet": AlexNet,
    "VGG11": partial(VGG11, norm="instance"),
    "VGG11BN": partial(VGG11, norm="batch"),
    "ResNet18": partial(ResNet18, norm="instance"),
    "ResNet18BN": partial(ResNet18, norm="batch"),
    "ResNet18_AP": partial(ResNet18, norm="instance", pool=True),
    "ResNet18BN_AP": partial(ResNet18, norm="batch", pool=True),
}
assert tuple(_MAKERS) == CLASSICS


def build_network(name: str, channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """A freshly initialised network that maps images [B, channels, *image_size] to logits [B, num_classes].

    `name` is one of `NAMES`, or ConvNet with any combination of suffixes. The weights are torch's default
    initialisation from its global generator: `torch.manual_seed` before the call makes them repeatable. Its
    `image_shape` is the shape [C, H, W] of its input.

    Raises:
        UserError: no such network, or it cannot read images of this size.
    """
    family = name.removesuffix("_Tiny")
    if family not in CLASSICS:
        return ConvNet(ConvNetPlan.parse(name), channels, num_classes, image_size)

    readable = {(3, 64, 64)} if name.endswith("_Tiny") else {(3, 32, 32), (1, 28, 28)}
    if family != "MLP" and (channels, *image_size) not in readable:
        raise UserError(
            f"{name} cannot read {channels}×{image_size[0]}×{image_size[1]} images: {family} reads 3×32×32 and 1×28×28,"
            f" {family}_Tiny reads 3×64×64; ConvNet and MLP read any size"
        )
    network = _MAKERS[family](channels, num_classes, image_size)
    network.image_shape = (channels, *image_size)
    return network


def has_batch_norm(network: nn.Module) -> bool:
    """Whether the network has batch norm, whose running statistics are not among its parameters."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
