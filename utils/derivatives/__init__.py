"""A step's derivatives: by autograd or by hand, compiled or captured."""
