"""Kernels in Gluon for compute capability 9.0, with layouts and copies written out."""
