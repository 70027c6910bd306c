"""Errors that paikern raises on purpose. Each carries one line: what, which value, and the fix."""

from __future__ import annotations


class PaikernError(Exception):
    """Base class: catching it catches every error that paikern raises on purpose."""


class MaskFormatError(PaikernError):
    """A mask file is truncated, altered, oversized, or belongs to another model."""


class PathRuleError(PaikernError):
    """The path engine met an operation for which no path rule is registered."""


class BackendError(PaikernError):
    """A backend was asked for that this machine or this operation does not have."""


class SparsityError(PaikernError, ValueError):
    """A sparsity, density, count or layer budget that cannot be met."""


class NonFiniteScoreError(PaikernError, ValueError):
    """Scores or weights hold NaN or infinity where an exact ranking is asked for."""


class PaikernWarning(UserWarning):
    """Something worth knowing that does not stop the run, such as a layer that lost all weights."""
