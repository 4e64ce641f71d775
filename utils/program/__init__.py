"""What all programs share around their computation; imports nothing from buffer/ or distill/."""
