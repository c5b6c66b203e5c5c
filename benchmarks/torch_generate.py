"""transformers' generate in torch on the CPU, beside ours in decode_beside_torch.py.

It runs in a process of its own. D width, H heads, K width of a head, F hidden width, E experts,
V vocabulary.
"""

import time
from typing import Any
import warnings

import numpy as np

# In this process: the model, and which of transformers' ways of computing experts it takes.
model: Any


def build(settings: dict, arrays: dict[str, np.ndarray], experts: str, compiled: bool) -> None:
    """Make the model of these settings with our model's weights.

    Args:
        settings: of its class's config; "class" is Mixtral or Qwen3Moe.
        arrays: ours, by their names.
        experts: "eager", "batched_mm" or "grouped_mm".
        compiled: let generate compile the step with the static cache, as it does on GPUs.
    """
    global model
    warnings.simplefilter("ignore")
    import torch
    import transformers

    settings = dict(settings)
    name = settings.pop("class")
    config = getattr(transformers, f"{name}Config")(**settings)
    config._experts_implementation = experts
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    model.load_state_dict({n: torch.from_numpy(a) for n, a in renamed(arrays).items()})
    how = model.generation_config
    how.do_sample, how.eos_token_id, how.pad_token_id = False, None, 0
    how.cache_implementation, how.disable_compile = "static", not compiled
    if compiled:
        how.compile_config = transformers.CompileConfig(fullgraph=False, mode="default")
        how.compile_config._compile_all_devices = True


def generate(token_T: list[int], tokens: int) -> tuple[float, list[int]]:
    """Seconds, and so many further tokens, the likeliest each time."""
    import torch

    ids = torch.tensor([token_T])
    start = time.perf_counter()
    with torch.inference_mode():
        text = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens)
    seconds = time.perf_counter() - start
    return seconds, text[0, len(token_T) :].tolist()


def logits(token_T: list[int]) -> np.ndarray:
    """(T, V), by a pass over the text."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor([token_T]), use_cache=False).logits[0].numpy()


def versions() -> dict[str, str]:
    """Of torch and transformers."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def renamed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our arrays under transformers' names and in its order of axes (outputs before inputs)."""
    found = {
        "model.embed_tokens.weight": 50 * arrays["embedding_VD"],  # ours is scaled when it is read
        "lm_head.weight": arrays["head_DV"].T,
        "model.norm.weight": arrays["final_norm.scale_D"],
    }
    prefix = "stacks.0.unit.blocks.0."
    layers = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    for i in range(len(layers["attention_norm.scale_D"])):
        layer = {name: a[i] for name, a in layers.items()}
        width = len(layer["attention_norm.scale_D"])
        gate, up = (layer[f"feed_forward.experts.{name}_EDF"] for name in ("gate", "up"))
        own = {
            "input_layernorm.weight": layer["attention_norm.scale_D"],
            "post_attention_layernorm.weight": layer["feed_forward_norm.scale_D"],
            "self_attn.q_proj.weight": layer["attention.query_DHK"].reshape(width, -1).T,
            "self_attn.k_proj.weight": layer["attention.key_DNK"].reshape(width, -1).T,
            "self_attn.v_proj.weight": layer["attention.value_DNK"].reshape(width, -1).T,
            "self_attn.o_proj.weight": layer["attention.out_HKD"].reshape(-1, width).T,
            "mlp.gate.weight": layer["feed_forward.router.weight_DE"].T,
            "mlp.experts.gate_up_proj": np.concatenate([gate, up], -1).swapaxes(1, 2),
            "mlp.experts.down_proj": layer["feed_forward.experts.down_EFD"].swapaxes(1, 2),
        }
        for ours, theirs in (("query", "q"), ("key", "k")):
            if f"attention.{ours}_norm.scale_D" in layer:
                scale_K = layer[f"attention.{ours}_norm.scale_D"]
                own[f"self_attn.{theirs}_norm.weight"] = scale_K
        found |= {f"model.layers.{i}.{name}": a for name, a in own.items()}
    return {name: np.ascontiguousarray(a) for name, a in found.items()}
