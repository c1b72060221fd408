"""Where the messages of this package are defined, apart from those of any other program's."""

from google.protobuf import descriptor_pool

POOL = descriptor_pool.DescriptorPool()
