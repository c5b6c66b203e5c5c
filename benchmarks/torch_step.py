"""A training step of transformers' OLMoE in torch, beside ours in accelerator_parts.py."""

import contextlib
import statistics
import time

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM


def measure(mode: str, precision: str, steps: int, small: bool) -> dict:
    """Milliseconds of forward, backward and AdamW.

    mode: "eager" or "compiled". precision: "bfloat16" for parameters and moments too, or anything
    else for float32 parameters under autocast.
    """
    width, depth, experts, hidden = (64, 2, 8, 64) if small else (2048, 4, 64, 1024)
    vocab, batch, length = (256, 4, 64) if small else (50304, 8, 2048)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = OlmoeConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 128),
        num_experts=experts,
        num_experts_per_tok=2 if small else 8,
        max_position_embeddings=length,
        use_cache=False,
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    whole = precision == "bfloat16"
    model = OlmoeForCausalLM(config).to(device, torch.bfloat16 if whole else torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    run = torch.compile(model) if mode == "compiled" else model
    ids = torch.randint(0, vocab, (batch, length), device=device)
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        cast = contextlib.nullcontext() if whole else torch.autocast(device, torch.bfloat16)
        with cast:
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "milliseconds": 1e3 * median,
        "tokens_per_second": batch * length / median,
        "torch": torch.__version__,
        "peak_bytes": peak,
    }
