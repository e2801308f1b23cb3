"""Why an adapter that is merged and quantized to NF4 again is lost: how many 4-bit values are still the base's."""

import json

from fidelity_ways import Setup, Subject
from lorikeet.adapters.merge.base import pieces
from lorikeet.adapters.merge.targets import Onto, Target
from lorikeet.kernels.nf4_quantize import quantize_blocks
from lorikeet.server.merge_plan import MergeRequest, plan_merge
from tqdm import tqdm


def unchanged_codes(subject: Subject, setup: Setup) -> float:
    """Share of the NF4 values of the weights that the adapter changes that are the same after a merge onto NF4.

    Args:
        subject: the adapter; what was found before is taken from the cache.
        setup: base and cache.
    """
    kept = setup.work.parent / subject.digest / "codes.json"
    if kept.is_file() and not setup.fresh:
        return float(json.loads(kept.read_text())["unchanged"])
    plan = plan_merge(
        MergeRequest(setup.config.model, (subject.adapter,), Target.NF4, setup.work / "unwritten", onto=Onto.NF4)
    )
    same = total = 0
    linears = [parameter for parameter in plan.parameters if parameter.name in plan.base.linears]
    for parameter in tqdm(linears, desc=f"{subject.name}: NF4 values", unit="weight"):
        rows = plan.base.open(parameter.name)
        for (start, stop), merged in zip(pieces(parameter.shape), plan.model.read(parameter), strict=True):
            base = rows.read(start, stop)
            if merged.equal(base):  # the adapter leaves this weight as it is
                continue
            one, other = quantize_blocks(merged)[0], quantize_blocks(base)[0]
            same += int((one >> 4 == other >> 4).sum() + (one & 15 == other & 15).sum())
            total += merged.numel()
    found = same / total
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"unchanged": found}) + "\n")
    return found
