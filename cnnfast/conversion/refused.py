"""Why a container keeps its own forward."""


class Refused(Exception):
    """A container's forward cannot be traced. The message says why, in words that follow "not fused:"."""


class Drew(Refused):
    """Random numbers were drawn meanwhile: by the forward, or by another thread."""
