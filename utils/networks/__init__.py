"""Name → network. Import from here."""

from utils import later
from utils.networks.names import (
    EVALUATION_POOLS,
    NAMES,
    ConvNetPlan,
    check_network_name,
    evaluation_pool,
    same_network,
)

__getattr__ = later("utils.networks.architectures", "ConvNet", "NORM_GROUPS", "LEAK", "build_network", "has_batch_norm")
