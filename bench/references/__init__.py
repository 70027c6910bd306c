"""Pure-PyTorch versions of the methods, written as they are commonly run: slow, plain, independent of paikern."""
