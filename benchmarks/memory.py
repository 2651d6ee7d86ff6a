"""Memory of a process that has run both graphs of a package: are the weights in it once?

Examples:
    python benchmarks/memory.py --shape smollm2-135m
    python benchmarks/memory.py --package artifacts/my-model --slots 4
