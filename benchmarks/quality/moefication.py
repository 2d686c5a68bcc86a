"""A mixture of experts with real weights: the MLPs of a small dense Llama cut into experts (after arXiv 2110.01786).

    python -m benchmarks.quality.moefication MODEL OUT

The neurons of each MLP are clustered by their gate weights into equal experts; a linear router is fitted to how much
each expert adds to the output on a little text; each token runs the `top_k` experts the router ranks first. The
result is an ordinary Mixtral checkpoint: routing is uneven by nature, its perplexity that of a real, worse model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from sarqc.model.calibration_data import windows

EXPERTS = 8
TOP_K = 6
ROUTER_SCALE = 0.02
"""Logits are kept this small so that the softmax over the chosen experts is nearly flat: routing is by rank alone."""


def cluster(rows: Tensor, clusters: int, rounds: int = 8) -> Tensor:
    """Balanced spherical k-means: the cluster [n] of each row of [n, d], n / clusters rows in each."""
    points = torch.nn.functional.normalize(rows.float(), dim=1)
    capacity = len(points) // clusters
    generator = torch.Generator().manual_seed(0)
    centres = points[torch.randperm(len(points), generator=generator)[:clusters]]
    assigned = torch.zeros(len(points), dtype=torch.int64)
    for _ in range(rounds):
        likeness = points @ centres.T
        # Whoever would lose most by a second choice chooses first.
        best = likeness.topk(2, dim=1).values
        free = [capacity] * clusters
        preference = likeness.argsort(dim=1, descending=True).tolist()
        for row in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():
            choice = next(c for c in preference[row] if free[c])
            assigned[row] = choice
            free[choice] -= 1
        centres = torch.stack([points[assigned == c].mean(0) for c in range(clusters)])
        centres = torch.nn.functional.normalize(centres, dim=1)
    return assigned


def fit_router(x: Tensor, contribution: Tensor) -> Tensor:
    """Router weights [E, H] from inputs x [T, H] and how much each expert contributes [T, E], by ridge regression."""
    target = contribution / contribution.mean()
    target = target - target.mean(1, keepdim=True)
    gram = x.T @ x
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    return ROUTER_SCALE * torch.linalg.solve(gram, x.T @ target).T


@torch.inference_mode()
def moefy(model: LlamaForCausalLM, tokens: Tensor) -> MixtralForCausalLM:
    """The Mixtral model of a dense Llama; tokens int64 [S, L] is the text its routers are fitted on."""
    dense = model.config
    config = MixtralConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size // EXPERTS,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        head_dim=dense.head_dim,
        hidden_act=dense.hidden_act,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=dense.rope_parameters,
        tie_word_embeddings=dense.tie_word_embeddings,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
        sliding_window=None,
        dtype="bfloat16",
    )
    seen: dict[int, list[Tensor]] = {index: [] for index in range(dense.num_hidden_layers)}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, index=index: seen[index].append(args[0].flatten(0, 1)))
        for index, layer in enumerate(model.model.layers)
    ]
    for window in tokens.split(1):
        model.model(window, use_cache=False)
    for hook in hooks:
        hook.remove()
    experts = MixtralForCausalLM(config).to(model.dtype)
    plain = {k: v for k, v in model.state_dict().items() if ".mlp." not in k}
    experts.load_state_dict(plain, strict=False)
    for index, layer in enumerate(model.model.layers):
        _split_mlp(layer.mlp, experts.model.layers[index].mlp, torch.cat(seen[index]))
    return experts.to(torch.bfloat16)


def _split_mlp(mlp: torch.nn.Module, moe: torch.nn.Module, x: Tensor) -> None:
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    assigned = cluster(gate, EXPERTS)
    active = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    contribution = []
    for expert in range(EXPERTS):
        own = (assigned == expert).nonzero().flatten()
        moe.experts.gate_up_proj[expert] = torch.cat([gate[own], up[own]])
        # The chosen experts' weights are about 1 / TOP_K each; the product makes them count whole.
        moe.experts.down_proj[expert] = TOP_K * down[:, own]
        contribution.append((active[:, own] @ down[:, own].T).norm(dim=1))
    moe.gate.weight.copy_(fit_router(x, torch.stack(contribution, dim=1)))


def write(source: Path, out: Path) -> None:
    """Read a dense checkpoint, write its MoE form beside its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = windows("builtin", lambda: tokenizer, seqlen=256).draw(16, seed=1)
    model = moefy(LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), text.tokens)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    write(args.model, args.out)
