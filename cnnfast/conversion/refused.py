"""Why a container keeps its own forward."""


class Refused(Exception):
    """Says, in words that follow "not fused:", what stands against tracing a container's forward."""
