"""The Open Inference Protocol (KServe v2), as Triton's clients speak it, on the same engine.

Every task of a bundle is a model of its own, as tasks differ in what they take and give.
"""
