"""A `Runner` over a small base with hand-made adapters, and what a torch model with the same changes answers."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.layers import LoraLinear
from lorikeet.adapters.lora_batch import LoraBatch
from lorikeet.server.base.loader import load_base
from lorikeet.server.base.model import BaseModel
from lorikeet.server.engine.runner import Runner
from lorikeet.server.engine.scheduler import ScheduledRequest, ScheduledStep
from torch import Tensor

from ..adapters.hand_made import HandMade
from ..base.family_models import VOCAB, oracle, save_family
from ..devices import CPU

BLOCK, MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS = 8, 512, 24, 8
DIM = 128
MORE, LESS, ADDED = VOCAB + 11, VOCAB - 60, VOCAB + 3

Members = tuple[tuple[str, float], ...]


@dataclass(eq=False)
class Stream:
    """A request as the runner sees it: its tokens, where its KV lies, and its batch slot."""

    tokens: list[int]
    slot: int
    members: Members
    block_table: list[int]
    done: int = 0

    def token_ids(self, start: int, stop: int) -> list[int]:
        return self.tokens[start:stop]


class AdaptedRunner:
    """One family's base with the adapters of `adapters_for`."""

    def __init__(
        self, family: str, directory: Path, dtype: torch.dtype = torch.float32, device: torch.device = CPU
    ) -> None:
        save_family(family, directory)
        self.reference = oracle(directory, device).to(CPU)
        self.base = load_base(str(directory), device=device, compute_dtype=dtype, progress=False)
        self.adapters = adapters_for(self.base)
        self.store = DeviceStore(self.base.site_table, dtype, self.base.device, 64 * 2**20, max_slots=16)
        self.slots: dict[str, int] = {}
        # Something before them that can be removed, so that compaction moves them all.
        self.spare = self.store.install(HandMade(self.base.site_table, 99).lora(7, "lm_head").pack(dtype))
        for name, adapter in self.adapters.items():
            slot = self.store.install(adapter.pack(dtype))
            assert slot is not None
            self.slots[name] = slot
        lora = LoraBatch(self.store, max_tokens=MAX_TOKENS, max_segments=MAX_REQUESTS)
        self.base.wrap_sites(lambda linear, site: LoraLinear(linear, site, lora))
        self.compositions: dict[int, Members] = {}
        self.runner = Runner(
            self.base,
            lora,
            self.base.new_kv_cache(MAX_REQUESTS * MAX_BLOCKS, BLOCK),
            max_tokens=MAX_TOKENS,
            max_requests=MAX_REQUESTS,
            max_blocks=MAX_BLOCKS,
            expand=lambda slot: [(self.slots[name], weight) for name, weight in self.compositions[slot]],
        )
        self._answers: dict[tuple[Members, tuple[int, ...]], Tensor] = {}

    def sequence(self, number: int, length: int, *members: tuple[str, float]) -> Stream:
        """The `number`-th sequence of a batch: random tokens that its adapters know."""
        slot = -1
        if len(members) == 1 and members[0][1] == 1.0:
            slot = self.slots[members[0][0]]
        elif members:
            slot = self.store.max_slots + number
            self.compositions[slot] = members
        vocab = next((v for name, _ in members if (v := self.adapters[name].vocab_size)), VOCAB)
        tokens = [random.randrange(vocab) for _ in range(length)]
        # Ids that only the adapter knows, or computes in a way of its own, must be among them.
        tokens[length // 2] = vocab - 1
        tokens[0] = min(OWN_TOKENS[1], vocab - 2)
        return Stream(tokens, slot, members, list(range(number * MAX_BLOCKS, (number + 1) * MAX_BLOCKS)))

    def step(self, items: Sequence[tuple[Stream, int, bool]]) -> list[Tensor]:
        """Run n more tokens of each (sequence, n, samples); the logits of those that sample, in the given order."""
        order = sorted(range(len(items)), key=lambda i: items[i][0].slot)
        scheduled = []
        for i in order:
            sequence, n, samples = items[i]
            scheduled.append(ScheduledRequest(sequence, sequence.done, n, samples))  # type: ignore[arg-type]
            sequence.done += n
        logits = self.runner.forward(ScheduledStep(scheduled)).cpu()
        sampling = [i for i in order if items[i][2]]
        assert len(logits) == len(sampling)
        by_item = dict(zip(sampling, logits, strict=True))
        return [by_item[i] for i, (_, _, samples) in enumerate(items) if samples]

    @torch.inference_mode()
    def expected(self, sequence: Stream) -> Tensor:
        """The reference's logits after the tokens computed so far: [vocab of the sequence]."""
        key = sequence.members, tuple(sequence.tokens)
        if key not in self._answers:
            model = copy.deepcopy(self.reference)
            # Whole weights before what is added to them.
            for name, weight in sorted(sequence.members, key=lambda member: member[1] != 1.0):
                self.adapters[name].apply(model.get_submodule, weight)
            out = model(input_ids=torch.tensor([sequence.tokens]), use_cache=False)
            self._answers[key] = out.logits[0].float()
        return self._answers[key][sequence.done - 1]


OWN_TOKENS = (3, 77, VOCAB - 4)


def adapters_for(base: BaseModel) -> dict[str, HandMade]:
    """One adapter of each kind, and a plain one."""
    table, sites = base.module_table, base.site_table
    leaves = [m for m in sites.by_module if ".layers.1." in m]
    norms = [
        path for path in table.by_path if path != table.embedding and (".layers.2." in path or "norm" in path[:10])
    ]
    seeds = iter(range(100))

    def new() -> HandMade:
        return HandMade(sites, next(seeds), std=0.1)

    adapters = {"lora": new().lora(3, *leaves[:-1], leaves[-1]), "head": new().lora(2, "lm_head", leaves[0])}
    adapters["affine"] = new().affine(leaves[0], leaves[-1], "lm_head").lora(2, leaves[0], "lm_head")
    adapters["embedding"] = new().embedding_lora(table.embedding, 3, VOCAB, DIM, table.embedding_scale)
    for name, size in (("larger", MORE), ("smaller", LESS)):
        own = new()
        adapters[name] = own.weight(table.embedding, weight=own.randn(size, DIM, std=0.1))
        own.weight(table.head, weight=own.randn(size, DIM, std=0.1)).vocab_size = size
    adapters["tokens"] = new().token_rows(OWN_TOKENS, DIM, table.embedding, table.head)
    added = [OWN_TOKENS[1], *range(VOCAB, ADDED)]
    adapters["added"] = new().token_rows(added, DIM, table.embedding, table.head).lora(2, leaves[1])
    adapters["added"].vocab_size = ADDED
    own = adapters["norms"] = new()
    for path in norms:
        own.weight(path, **{n: 1 + own.randn(*s, std=0.3) for n, s in table.by_path[path].shapes.items()})
    own = adapters["linears"] = new()
    for module in leaves[::2]:
        site, index = sites.by_module[module]
        own.weight(module, weight=own.randn(site.slices[index].out_features, site.in_features, std=0.1))
    own.lora(2, leaves[1])
    own = adapters["own_head"] = new()
    own.weight(table.head, weight=own.randn(VOCAB, DIM, std=0.1))
    return adapters
