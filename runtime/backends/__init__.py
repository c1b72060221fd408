"""One file a backend: the only code of the runtime that touches a device."""
