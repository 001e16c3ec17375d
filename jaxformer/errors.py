"""The error for wrong input. In a file of its own because it must be raised without jax."""


class ConfigError(ValueError):
    """Wrong input from the user: one line that names the field, the value and the remedy."""


class Agreed(RuntimeError):
    """An end of the run that all its processes come to at the same step."""


STOPPED = 75  # exit code, EX_TEMPFAIL: left on a signal or for want of peers; run again to continue
