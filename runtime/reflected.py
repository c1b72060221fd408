"""What reflection can tell of: the messages of nuwa.v1 and those of the package `inference`.

The latter have a pool of their own (proto/generate.py says why); reflection looks in one object.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pool

from nuwa.inference.pool import POOL


class Pools:
    """As a DescriptorPool for grpc_reflection, which finds what either pool has; else KeyError."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("Find"):
            raise AttributeError(name)

        def find(*arguments: Any) -> Any:
            try:
                return getattr(descriptor_pool.Default(), name)(*arguments)
            except KeyError:
                return getattr(POOL, name)(*arguments)

        return find
