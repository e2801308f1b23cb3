"""A running server as a `TextScorer`. Imports no torch."""

from collections.abc import Sequence

from ..client import LorikeetClient, ScoreOptions

# What answers: references of adapters (an id, an alias or id@digest-prefix) with their weights; none is the base.
References = Sequence[tuple[str, float | None]]


class RemoteScorer:
    """Scores on a server, through `Score` and `Tokenize`.

    Args:
        client: connected; serves any number of threads.

    Attributes:
        max_context: most tokens of a text, known after the first `encode`.
    """

    def __init__(self, client: LorikeetClient) -> None:
        self._client = client
        self.max_context = 0

    def encode(self, text: str, members: References) -> list[int]:
        """Token ids of a text, as the first adapter reads it: members with different tokenizers are refused anyway."""
        answer = self._client.tokenize(text, members[0][0] if members else "")
        self.max_context = answer.max_context
        return list(answer.token_ids)

    def score(self, token_ids: Sequence[int], first: int, members: References) -> list[float]:
        """Log probabilities of the tokens from `first` on."""
        options: ScoreOptions = {"token_ids": token_ids, "first": first}
        if len(members) > 1:
            options["adapters"] = [(reference, 1.0 if weight is None else weight) for reference, weight in members]
        for reference, weight in members if len(members) == 1 else ():
            options["adapter_id"] = reference
            if weight is not None:
                options["strength"] = weight
        return [score.logprob for score in self._client.score(**options).logprobs]
