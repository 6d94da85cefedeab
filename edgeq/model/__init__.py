"""The model, written once against the operations of `edgeq.backends.ops`."""
