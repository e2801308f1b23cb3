"""Models are timed in turns, round by round."""

from collections.abc import Sequence

from lorikeet.server.evaluation.step_times import step_times


class Clocked:
    """A model that tells when it was asked."""

    def __init__(self, name: str, log: list[str], *, is_timed: bool = True) -> None:
        self.is_timed = is_timed
        self._name, self._log = name, log

    def decode_step_s(self, prompt: Sequence[int], steps: int) -> float:
        assert list(prompt) == list(range(32)) and steps == 3
        self._log.append(self._name)
        return float(len(self._log))


def test_every_round_has_every_model_and_goes_the_other_way() -> None:
    log: list[str] = []
    told: list[None] = []
    models = {
        "a": Clocked("a", log),
        "b": Clocked("b", log),
        "unpacked": Clocked("unpacked", log, is_timed=False),
        "c": Clocked("c", log),
    }
    found = step_times(models, [[7] * 5, range(50)], rounds=2, steps=3, tell=lambda: told.append(None))
    assert "".join(log) == "abccbaabc" and len(told) == 9
    # The first round is not kept.
    assert found == {"c": [4.0, 9.0], "b": [5.0, 8.0], "a": [6.0, 7.0]}
