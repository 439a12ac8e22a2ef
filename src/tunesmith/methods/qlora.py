"""QLoRA: LoRA on a base kept in 4-bit NormalFloat (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from tunesmith.methods.lora import Lora
from tunesmith.models.load import load_model


class QLora(Lora):
    """Frozen base in NF4 with double quantisation, adapters as in LoRA.

    Norms, embeddings and head stay in the compute dtype: PEFT's k-bit preparation would convert them to float32, which costs
    two more bytes per parameter (2 GiB on Qwen2-7B) and a float32 copy of every activation.

    The adapter is trained on top of the quantised weights, so it is merged into those (dequantised), not into the
    original ones: merging into the original base gives a different model from the one that was trained.
    """

    name: ClassVar[str] = "qlora"

    def quantization(self, skip: list[str] | None = None) -> Any:
        """Settings to quantise the base to NF4; modules in `skip` (and by default the head) are not quantised."""
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
            llm_int8_skip_modules=skip,
        )

    def load_base(self) -> Any:
        model = load_model(
            self.folder, dtype=self.compute_dtype, quantization_config=self.quantization(), rope_scaling=self.rope_scaling
        )
        # On a CPU, unquantised tensors are views of the mapped file, which would keep the quantised ones' originals in memory
        # too: 2 bytes per parameter.
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.is_floating_point():
                parameter.data = parameter.data.clone()
        return model

    def load_trained(self, folder: Path) -> Any:
        import torch
        from bitsandbytes.nn import Linear4bit
        from peft import PeftModel

        model = PeftModel.from_pretrained(self.load_base(), folder)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.compute_dtype = torch.float32
                module.weight.quant_state.dtype = torch.float32  # exact NF4 values, without intermediate rounding
                # Else bitsandbytes, on CPUs with AVX512-BF16 and only outside training, uses a kernel that rounds
                # activations to bf16: predictions differ by 1e-3 from what training computed.
                module.support_avx512bf16_for_cpu = False
        return model

    def merge(self, model: Any) -> Any:
        import torch
        from peft import get_peft_model

        config = model.peft_config["default"]
        own = ("lora_", "modules_to_save")
        adapter = {name: value for name, value in model.state_dict().items() if any(part in name for part in own)}
        base = model.unload().dequantize(dtype=torch.float32).to(torch.float32)
        merged = get_peft_model(base, config)
        unplaced = merged.load_state_dict(adapter, strict=False).unexpected_keys
        if unplaced:
            raise AssertionError(f"adapter parameters without a place in the base: {unplaced[:3]}")
        return merged.merge_and_unload(safe_merge=True)
