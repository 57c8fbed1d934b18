"""The base model, its adapter and its head; attention over trees; what quantisation did to a weight."""
