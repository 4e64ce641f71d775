"""Shows runs and exports distilled sets: pages, figures, animations, the wandb log, PNG files and cards."""
