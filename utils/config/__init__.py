"""The options of the programs: their types, their definitions and the meaning of values. Import from here."""

from utils.config.option_types import AUTO, STARTS
from utils.config.options import (
    GROUPS,
    BaselineConfig,
    BufferConfig,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    TeslaConfig,
    TrainConfig,
)
from utils.config.values import (
    Config,
    about,
    as_dict,
    canonical,
    changed,
    defaults,
    differences,
    from_repository,
    from_root,
    has_effect,
    hints_of,
    how_much,
    identity,
    image_size,
    influential,
    is_path,
    make,
    path_options,
    value_in_words,
    worth_giving,
)
