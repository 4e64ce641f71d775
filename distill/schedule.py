"""The difficulty window: which start epochs an iteration may draw (DATM, section 3.2)."""


def start_epoch_bound(iteration: int, max_start_epoch: int, current_max_start_epoch: int,
                      expansion_end_epoch: int, sequential: bool) -> int:
    """The exclusive upper bound of the start epochs at `iteration`.

    With sequential generation the bound grows linearly from `current_max_start_epoch` at iteration 0 to
    `max_start_epoch` at iteration `expansion_end_epoch`; without it, or where there is nothing to grow, the bound is
    `max_start_epoch` throughout.
    """
    if not sequential or current_max_start_epoch >= max_start_epoch:
        return max_start_epoch
    grown = int((max_start_epoch - current_max_start_epoch) * iteration / expansion_end_epoch)
    return min(current_max_start_epoch + grown, max_start_epoch)
