"""Errors of evaluations; printed by the CLI without a traceback."""

from ...adapters.errors import Code, ServingError


class EvaluationError(ServingError):
    """A model or text cannot be evaluated as asked: which, and what to change."""

    code = Code.INVALID_ARGUMENT
    reason = "EVALUATION"


class TextTooShortError(EvaluationError):
    """The text has too few tokens for a perplexity that says anything."""

    reason = "TEXT_TOO_SHORT"
