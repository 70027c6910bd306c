"""Pure-PyTorch versions of the methods, as they are commonly run: slow, plain, independent."""
