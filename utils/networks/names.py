"""The names of the networks, and which are evaluated together; does not need torch."""

import re
from dataclasses import dataclass

from utils.errors import UserError, unknown_name

CLASSICS = ("MLP", "LeNet", "AlexNet", "VGG11", "VGG11BN", "ResNet18", "ResNet18BN", "ResNet18_AP", "ResNet18BN_AP")

# What may follow "ConvNet" in a name: at most one suffix for each field of a ConvNetPlan.
SUFFIXES: dict[str, tuple[str, int | str]] = {
    **{f"D{depth}": ("depth", depth) for depth in range(1, 9)},
    **{f"W{width}": ("width", width) for width in range(1, 4097)},
    **{"AS": ("activation", "sigmoid"), "AR": ("activation", "relu"), "AL": ("activation", "leaky")},
    **{"NN": ("norm", "none"), "BN": ("norm", "batch"), "LN": ("norm", "layer")},
    **{"IN": ("norm", "instance"), "GN": ("norm", "group")},
    **{"NP": ("pooling", "none"), "MP": ("pooling", "max"), "AP": ("pooling", "average")},
}
KIP = "W1024NN"  # the network of Nguyen et al. 2021, https://arxiv.org/abs/2107.13034
SUFFIX_RULE = "ConvNet takes one each of D1-D8, W1-W4096, AS|AR|AL, NN|BN|LN|IN|GN, NP|MP|AP, in any order"


@dataclass(frozen=True)
class ConvNetPlan:
    """The five choices that define a ConvNet; the defaults are the plain `ConvNet`."""

    depth: int = 3
    width: int = 128
    activation: str = "relu"
    norm: str = "instance"
    pooling: str = "average"

    def paddings(self, channels: int) -> list[int]:
        """The padding of each convolution, for images with `channels` channels."""
        return [1 + margin(channels)] + [1] * (self.depth - 1)

    @classmethod
    def parse(cls, name: str) -> "ConvNetPlan":
        """Parses a name: ConvNetD4W64 is ConvNetPlan(depth=4, width=64).

        Raises:
            UserError: the name is not "ConvNet" with known suffixes, or sets one field twice.
        """
        suffix = name.removeprefix("ConvNet").replace("KIP", KIP)
        tokens = re.findall(r"[DW]\d+|[A-Z]{2}", suffix)
        fields = dict(SUFFIXES[token] for token in tokens if token in SUFFIXES)
        one_of_each = len(fields) == len(tokens) and "".join(tokens) == suffix
        if not (name.startswith("ConvNet") and one_of_each):
            raise UserError(f"{unknown_name('network', name, NAMES)}; {SUFFIX_RULE}")
        return cls(**fields)


def same_network(one: str, other: str) -> bool:
    """Whether two names are of the same network for images of one size, as ConvNet and ConvNetIN are."""
    if not all(name.startswith("ConvNet") for name in (one, other)):
        return one.removesuffix("_Tiny") == other.removesuffix("_Tiny")
    return ConvNetPlan.parse(one) == ConvNetPlan.parse(other)


PUBLISHED_SUFFIXES = (
    "", *(f"D{depth}" for depth in range(1, 9)), "W32", "W64", "W128", "W256", "W512", "W1024", "AS", "AR", "AL",
    "NN", "BN", "LN", "IN", "GN", "NP", "MP", "AP", "D4BN", "KIP",
)  # fmt: skip
NAMES: tuple[str, ...] = (
    *(f"ConvNet{suffix}" for suffix in PUBLISHED_SUFFIXES), *CLASSICS, *(f"{name}_Tiny" for name in CLASSICS)
)  # fmt: skip

EVALUATION_POOLS = {
    "M": ["ConvNet", "AlexNet", "VGG11", "ResNet18"],
    "W": ["ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"],
    "D": ["ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"],
    "A": ["ConvNetAS", "ConvNetAR", "ConvNetAL"],
    "P": ["ConvNetNP", "ConvNetMP", "ConvNetAP"],
    "N": ["ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"],
    "BN": ["ConvNet", "ConvNetBN", "ResNet18", "ResNet18BN", "AlexNet", "VGG11", "ResNet18_AP"],
}


def check_network_name(name: str) -> None:
    """Refuses the name of a network that does not exist; the image size is not checked."""
    if name.removesuffix("_Tiny") not in CLASSICS:
        ConvNetPlan.parse(name)


def evaluation_pool(mode: str, model: str, image_size: tuple[int, int] | None = None) -> list[str]:
    """The names of the networks that evaluation mode `mode` trains on a set distilled with `model`.

    Args:
        image_size: for 64×64 images the classics are replaced by their `_Tiny` forms, except MLP, which reads any size.

    Raises:
        UserError: no such mode.
    """
    pools = {
        # Never with batch norm. As published, a classic's name is cut at BN; a ConvNet's may go on after it.
        "S": [model.replace("BN", "", 1) if model.startswith("ConvNet") else model.split("BN")[0]],
        "C": [model, "ConvNet"],
        **EVALUATION_POOLS,
    }
    if mode not in pools:
        raise unknown_name("eval_mode", mode, pools)
    tiny = set(CLASSICS) - {"MLP"} if image_size and stride(image_size) == 2 else ()
    # Without duplicates: in mode C the model may be the ConvNet itself.
    return [f"{name}_Tiny" if name in tiny else name for name in dict.fromkeys(pools[mode])]


def margin(channels: int) -> int:
    """Extra padding of the first convolution: one channel means 28×28 images as in MNIST, padded to 32×32."""
    return 2 if channels == 1 else 0


def stride(image_size: tuple[int, int]) -> int:
    """The stride that reduces 64×64 images (`_Tiny`) to the feature size of 32×32 ones."""
    return 2 if image_size[0] == 64 else 1
