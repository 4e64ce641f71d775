"""The names of the datasets and of the groups of augmentations; does not need torch."""

from utils.errors import unknown_name

NAMES = ("MiniFashion", "FashionMNIST", "MNIST", "CIFAR10", "CIFAR100", "SVHN", "Tiny", "ImageNet", "ImageNet1K",
         "ImageFolder")
# DSA group → its operations, all of which are applied when the group is drawn.
GROUPS = {"color": ("brightness", "saturation", "contrast")} | {
    name: (name,) for name in ("crop", "cutout", "flip", "scale", "rotate")}


def check_dataset_name(name: str) -> None:
    """Refuses a dataset that does not exist."""
    if name not in NAMES:
        raise unknown_name("dataset", name, NAMES)


def parse_strategy(strategy: str) -> tuple[str, ...]:
    """`color_crop_…` → its groups; `none` or an empty string → no group.

    Raises:
        UserError: a group that does not exist.
    """
    if strategy.lower() in ("", "none"):
        return ()
    groups = tuple(strategy.lower().split("_"))
    for group in groups:
        if group not in GROUPS:
            raise unknown_name("augmentation in --dsa_strategy", group, GROUPS)
    return groups
