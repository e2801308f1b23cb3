"""A server's adapters in a process that is made to be killed, and what they should be afterwards.

Run as `python -P restart_child.py DIRECTORY SEED START`: opens the state in DIRECTORY and makes one random change after
the other, from number START on. Prints `begin N` before and `done N` or `refused N` after each.
"""

import itertools
import pickle
import random
import sys
from pathlib import Path

import torch
from lorikeet.adapters.errors import ServingError
from lorikeet.adapters.fingerprint import BaseFingerprint
from lorikeet.adapters.info import Tier
from lorikeet.adapters.manager import AdapterManager
from lorikeet.adapters.modules import Module, ModuleKind, ModuleTable
from lorikeet.adapters.state.state_dir import open_state_dir

SITES_FILE = "sites.pickle"
IDS = ("ant", "bee", "cat")
ALIASES = ("prod", "stage")
NUM_VARIANTS = 5
EMBEDDING = Module("model.embed_tokens", ModuleKind.EMBEDDING, {"weight": (64, 32)})


def open_manager(directory, sites):
    """The state in `directory` with all that survived in it; returns (manager, state)."""
    state = open_state_dir(directory / "durable", directory / "scratch", 2**24)
    manager = AdapterManager(
        sites,
        ModuleTable({EMBEDDING.path: EMBEDDING}, EMBEDDING.path, "lm_head", is_tied=False, vocab_size=64),
        None,  # plain LoRA asks nothing of the base's weights
        BaseFingerprint("tiny-llama"),
        dtype=torch.float32,
        device=torch.device("cpu"),
        device_budget_bytes=2**18,
        host_budget_bytes=2**18,
        roots=[directory / "adapters"],
        state=state,
        max_slots=8,
    )
    manager.start()
    manager.restore()
    manager.finish_restore()
    return manager, state


def change_number(seed, number, digests):
    """A reproducible change: the name of a method of Model and the manager's arguments."""
    rng = random.Random(f"{seed}/{number}")
    name, variant = rng.choice(IDS), rng.randrange(NUM_VARIANTS)
    kind = rng.choice(["load"] * 4 + ["alias"] * 3 + ["rollback", "rollback", "pin", "unpin", "unload", "delete_alias"])
    match kind:
        case "load":
            return kind, name, variant
        case "pin":
            return kind, name, rng.choice([Tier.HOST, Tier.DEVICE])
        case "alias":
            others = [(other, rng.choice(["", rng.choice(digests)]), rng.uniform(0.5, 2)) for other in IDS]
            return kind, rng.choice(ALIASES), tuple(rng.sample(others, rng.randrange(1, 3)))
        case "delete_alias":
            return kind, rng.choice(ALIASES)
    return kind, name


def make_change(manager, directory, kind, name, *rest):
    """Tell the manager."""
    match kind, rest:
        case "load", [variant]:
            manager.load(name, f"variants/v{variant}")
        case "pin", [tier]:
            manager.pin(name, tier)
        case "alias", [targets]:
            manager.set_alias(name, [(f"{i}@{d}" if d else i, weight) for i, d, weight in targets])
        case _:
            getattr(manager, kind)(name)


class Model:
    """What should be remembered, if every change that is told to it has happened.

    Attributes:
        adapters: id -> [current digest, the one before, tier it is pinned to].
        aliases: name -> targets.
    """

    def __init__(self, digests):
        self.adapters, self.aliases = {}, {}
        self._digests = digests

    def apply(self, kind, name, *rest):
        adapter = self.adapters.get(name)
        match kind, rest:
            case "load", [variant]:
                digest = self._digests[variant]
                if adapter is None:
                    self.adapters[name] = [digest, "", None]
                elif adapter[0] != digest:
                    self.adapters[name] = [digest, adapter[0], adapter[2]]
            case "rollback", []:
                adapter[0], adapter[1] = adapter[1], adapter[0]
            case "pin", [tier]:
                adapter[2] = tier
            case "unpin", []:
                adapter[2] = None
            case "unload", []:
                del self.adapters[name]
            case "alias", [targets]:
                self.aliases[name] = tuple((i, d or self.adapters[i][0], weight) for i, d, weight in targets)
            case "delete_alias", []:
                del self.aliases[name]


def main(directory, seed, start):
    directory = Path(directory)
    sites, digests = pickle.loads((directory / SITES_FILE).read_bytes())
    manager, _ = open_manager(directory, sites)
    for number in itertools.count(int(start)):
        change = change_number(seed, number, digests)
        print(f"begin {number}", flush=True)
        try:
            make_change(manager, directory, *change)
            print(f"done {number}", flush=True)
        except ServingError:
            print(f"refused {number}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
