"""The derivatives of a training step: by autograd or hand-written, compiled or captured."""
