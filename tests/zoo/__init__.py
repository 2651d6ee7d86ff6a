"""Tiny random models of real architectures, made where they are needed."""
