"""What every program does before its computation: a config becomes objects."""

import torch
from torch import nn

from utils.config import DataConfig
from utils.datasets import Dataset, load_dataset
from utils.networks import build_network


def network_for(name: str, dataset: Dataset) -> nn.Module:
    """The named network for a dataset's images and classes."""
    return build_network(name, dataset.channels, dataset.num_classes, dataset.image_size)


def load_configured(config: DataConfig, device: torch.device) -> Dataset:
    """The dataset that a program's config names, on the device."""
    return load_dataset(config.dataset, config.data_path, subset=config.subset, zca=config.zca, res=config.res,
                        val_fraction=config.val_fraction, device=device)
