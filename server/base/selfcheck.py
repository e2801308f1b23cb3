"""Start-up comparison of paged attention with the model's own, for families that no test covers."""

import torch

from ..errors import BaseModelError
from .attention import ATTENTION, PagedStep
from .families import PROVEN
from .model import BaseModel

_TOKENS = 24
_BLOCK = 16
# The same weights on both sides: only the order of additions differs. Relative to the largest logit.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@torch.inference_mode()
def check_unproven_family(base: BaseModel) -> None:
    """Run a few tokens both ways; a proven family returns at once.

    A family that does something between projection and attention that the paged path does not know would otherwise
    answer wrongly without a word. Must run before LoRA layers are attached.

    Raises:
        BaseModelError: the two differ, or the family's forward cannot be run on the paged path at all.
    """
    if base.architecture in PROVEN:
        return
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.vocab_size, (1, _TOKENS), generator=generator).to(base.device)
    positions = torch.arange(_TOKENS, device=base.device).unsqueeze(0)
    try:
        paged = base.logits(ids, positions, paged=_one_sequence(base))
        base.config_of_model._attn_implementation = "eager"
        eager = base.logits(ids, positions)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _refused(base, f"its forward does not run on the paged path ({type(error).__name__})") from error
    finally:
        base.config_of_model._attn_implementation = ATTENTION
    difference = (paged - eager).abs().max().item()
    if not difference <= _TOLERANCE[base.compute_dtype] * max(1.0, eager.abs().max().item()):
        raise _refused(base, f"logits on the paged path differ from its own attention's by {difference:.3g}")


def _one_sequence(base: BaseModel) -> PagedStep:
    blocks = -(-_TOKENS // _BLOCK)

    def ints(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=base.device)

    return PagedStep(
        cache=base.new_kv_cache(blocks, _BLOCK),
        kv_slots=ints(list(range(_TOKENS)), torch.int64),
        query_starts=ints([0, _TOKENS]),
        context_lens=ints([_TOKENS]),
        block_tables=ints(list(range(blocks))).unsqueeze(0),
        max_query_len=_TOKENS,
        max_context_len=_TOKENS,
    )


def _refused(base: BaseModel, why: str) -> BaseModelError:
    return BaseModelError(
        f"The architecture {base.architecture} cannot be served: {why}.", {"architecture": base.architecture}
    )
