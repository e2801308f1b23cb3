"""Running out of device memory while a base is loaded says what it needs."""

import pytest
import torch
from lorikeet.server.base import loader
from lorikeet.server.base.footprint import resident_bytes
from lorikeet.server.base.loader import load_base
from lorikeet.server.base.site_plan import plan_sites
from lorikeet.server.errors import BaseModelError

from ..devices import CPU
from .family_models import save_family


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_resident_bytes_are_those_of_the_loaded_base(family, tmp_path):
    model = save_family(family, tmp_path)
    # Not in fp32, in which a CPU keeps the head in fewer bytes.
    base = load_base(str(tmp_path), device=CPU, compute_dtype=torch.bfloat16, progress=False)
    assert resident_bytes(model, plan_sites(model), torch.bfloat16) == pytest.approx(
        base.nf4_bytes + base.dense_bytes, rel=0.02
    )


def test_out_of_memory_while_loading_names_what_the_weights_take(tmp_path, monkeypatch):
    save_family("llama", tmp_path)

    def fill(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(loader, "fill_model", fill)
    with pytest.raises(BaseModelError, match=r"its weights take \d\.\d\d GiB, .* a smaller base") as caught:
        load_base(str(tmp_path), device=CPU, compute_dtype=torch.float32, progress=False)
    assert "Tried" not in caught.value.message
