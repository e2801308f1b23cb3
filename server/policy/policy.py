"""A policy, ready to be asked. Immutable, keeps nothing of what it is asked for, and may be asked on any thread."""

from ...adapters.errors import ServingError
from ..access import CLIENT_KEY
from ..engine.limits import AdapterLimits
from ..errors import ClientNotAllowedError
from .document import BASE, UNLIMITED, ClientRules, LimitRules, PolicyDocument
from .patterns import PatternTable, matches

_EVERYTHING = ClientRules(use=["*"], manage=["*"])
_NOTHING = ClientRules()


class Policy:
    """What a policy document says; an empty one lets everybody do everything, with weight 1 and no caps.

    A name is what a request or a call gives, an id or an alias; what follows an `@` is ignored, and "" is the base. Who
    is refused hears the same whether what was named exists or not.

    Args:
        document: checked.
    """

    def __init__(self, document: PolicyDocument | None = None) -> None:
        document = document or PolicyDocument()
        self._clients = None if document.clients is None else PatternTable(document.clients)
        self._default = _limits(LimitRules(), document.default)
        self._limits = PatternTable(
            {pattern: _limits(rules, document.default) for pattern, rules in document.adapters.items()}
        )

    def may_use(self, client: str | None, name: str) -> None:
        """Whether a client may send requests to an adapter.

        Args:
            client: as it names itself; None: it does not.
            name: of the adapter.

        Raises:
            ClientNotAllowedError: it may not.
        """
        if not _any(self._rules(client).use, name):
            raise _refusal(client, "use", name)

    def may_manage(self, client: str | None, name: str) -> None:
        """Whether a client may load, unload, pin or move an adapter or alias; arguments and error of `may_use`."""
        if not _any(self._rules(client).manage, name):
            raise _refusal(client, "manage", name)

    def may_list(self, client: str | None, name: str) -> bool:
        """Whether a client may know of an adapter or alias: what it may use or manage."""
        rules = self._rules(client)
        return _any(rules.use, name) or _any(rules.manage, name)

    def limits(self, adapter_id: str) -> AdapterLimits:
        """The limits of an adapter, by its id; "" is the base."""
        found = None if adapter_id else self._limits.get(BASE)
        return found or self._limits.find(adapter_id) or self._default

    def _rules(self, client: str | None) -> ClientRules:
        if self._clients is None:
            return _EVERYTHING
        return self._clients.find(client or "") or _NOTHING


def _any(patterns: list[str], name: str) -> bool:
    """Whether a pattern matches a name. The base has a word of its own; and `*` matches it, needing no characters."""
    name = name.partition("@")[0]
    return any(matches(pattern, name) for pattern in patterns) or (not name and BASE in patterns)


def _limits(rules: LimitRules, default: LimitRules) -> AdapterLimits:
    """What is set, else the default, else weight 1 and no cap."""
    caps: dict[str, int | None] = {}
    for name in ("max_running", "max_waiting", "tokens_per_minute"):
        cap = getattr(rules, name) or getattr(default, name)
        caps[name] = None if cap == UNLIMITED else cap
    return AdapterLimits(weight=rules.weight or default.weight or 1.0, **caps)


def _refusal(client: str | None, verb: str, name: str) -> ServingError:
    who = f"The client {client!r}" if client else f"A client that does not name itself ({CLIENT_KEY} metadata)"
    name = name.partition("@")[0][:128]
    what = f"what is called {name!r}" if name else "the base model"
    return ClientNotAllowedError(
        f"{who} may not {verb} {what}: the server's policy does not name it.",
        {"client": client or "", "adapter_id": name},
    )
