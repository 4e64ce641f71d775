"""What a set is worth: fresh networks are trained on it and tested on real images."""
