"""A campaign of mutations: models, heads and closures, changed in hundreds of ways.

Each case builds a small random model, changes something, asks the package for scores
and compares them with a truth that is computed without the package. A case that gets
numbers other than the truth is *wrong*, and there must be none: a model that cannot be
explained must be refused with an error.

    python -m benchmarks.mutations              # all cases, a table at the end
    python -m benchmarks.mutations --part 1/6   # every sixth case
    python -m benchmarks.mutations --only heads --verbose
    python -m benchmarks.mutations --list
"""
