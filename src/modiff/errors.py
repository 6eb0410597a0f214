"""Every error that modiff raises on purpose: `<where>: expected <what>, got <what>. <why>. <what to type instead>.`"""

import warnings


class ModiffError(Exception):
    """Root of all errors raised on purpose; catch it to catch them all."""


class ConfigError(ModiffError, ValueError):
    """A setting outside its range, an unknown name, or two settings that contradict each other."""


class StateError(ModiffError, RuntimeError):
    """The states of a layer do not fit what it is given: no trajectory, another batch size, dtype or device."""


class CalibrationError(ModiffError, RuntimeError):
    """Static scales were asked for but not measured, or the calibration saw no data."""


class KernelError(ModiffError, RuntimeError):
    """A kernel backend cannot run the shape, dtype or device it was asked to."""


class FormatError(ModiffError, ValueError):
    """A file or folder is missing, truncated, of another version, or not what its name promises."""


class PathError(ModiffError, OSError):
    """A file or folder cannot be written where it should go."""

    def __str__(self) -> str:
        return str(self.args[0])


class ModiffWarning(UserWarning):
    """Something works, but slower or less exactly than it could, and the message says what to do about it."""


_WARNED: set[str] = set()


def warn_once(cause: str, message: str) -> None:
    """Warn with a `ModiffWarning`, once for each cause in this process."""
    if cause not in _WARNED:
        _WARNED.add(cause)
        warnings.warn(message, ModiffWarning, stacklevel=2)
