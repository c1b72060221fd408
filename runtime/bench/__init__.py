"""`nuwa bench`: a model or a server measured beside the floor that its hardware sets."""
