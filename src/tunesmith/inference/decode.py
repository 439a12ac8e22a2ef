"""Answers to prompts with a shared prefix: the prefix goes through the model once, and its keys and values are stored once.

The prefix goes through the model first, then the suffixes of all prompts, right-padded, then one token per row and step. A
row's next token is written where its padding began, so later tokens of the same row attend to it, and no other row does.
Finished rows are removed. Shapes: B rows, H query heads, K key heads, P positions of the prefix, S positions of a row after
it, L tokens per forward pass, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.engine.attention.tree import repeat_heads
from tunesmith.engine.packing.batch import tree_unsupported_reason
from tunesmith.models.head import causal_of, logits_of, own_logits

NAME = "tunesmith_decode"

#: Chooses a token for each row by its logits (B, V).
Choice = Callable[[torch.Tensor], list[int]]

#: Entries of a generation config that choose tokens by more than their logits, and their neutral values.
_CHANGES: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "guidance_scale": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    **dict.fromkeys(
        (
            "bad_words_ids",
            "exponential_decay_length_penalty",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "suppress_tokens",
            "begin_suppress_tokens",
            "sequence_bias",
            "watermarking_config",
        ),
        (None,),
    ),
}


class _Layer:
    """One block's keys and values: of the prefix (1, K, P, D), and of each row after it (B, K, S, D)."""

    def __init__(self) -> None:
        self.prefix: tuple[torch.Tensor, torch.Tensor] | None = None
        self.own: tuple[torch.Tensor, torch.Tensor] | None = None


class Places:
    """The key/value cache and each token's slot; passed through the model's keyword arguments.

    `slots` (B, L) is each token's index after the prefix; None while the prefix itself goes through the model.
    """

    def __init__(self, layers: int, room: int) -> None:
        self.layers = [_Layer() for _ in range(layers)]
        self.room = room
        self.slots: torch.Tensor | None = None

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows."""
        for layer in self.layers:
            if layer.own is not None:
                layer.own = (layer.own[0][rows], layer.own[1][rows])


def sharing_unsupported_reason(model: Any, longest: int) -> str | None:
    """Why prompts of up to `longest` tokens with their answers cannot share a prefix in this model; None if they can."""
    causal = causal_of(model)
    if own_logits(causal):
        return "the model changes its logits after the head"
    asked = getattr(causal, "generation_config", None)
    for name, neutral in _CHANGES.items():
        if getattr(asked, name, None) not in neutral:
            return f"the generation config sets {name}"
    return tree_unsupported_reason(causal.config, longest)


def likeliest(logits: torch.Tensor) -> list[int]:
    """Greedy: the token with the highest logit."""
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


def sampled(temperature: float) -> Choice:
    """Draws from the softmax of logits / `temperature`, by torch's own generator."""

    def choose(logits: torch.Tensor) -> list[int]:
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        tokens: list[int] = torch.multinomial((exact / temperature).softmax(-1), 1).squeeze(-1).tolist()
        return tokens

    return choose


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    shared: int,
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    choose: Choice = likeliest,
) -> list[list[int]]:
    """For each prompt its answer, including the stop id that ended it. `shared` leading ids are the same in all prompts.

    At least one id of each prompt must follow them. The caller must check `sharing_unsupported_reason` first.
    """
    causal = causal_of(model)
    rests = [list(prompt[shared:]) for prompt in prompts]
    lengths = torch.tensor([len(rest) for rest in rests])
    width = int(lengths.max())
    config = causal.config.get_text_config()
    places = Places(config.num_hidden_layers, width + max_new_tokens)
    before = causal.config._attn_implementation
    causal.set_attn_implementation(NAME)
    try:
        if shared:
            _hidden(causal, places, torch.tensor([list(prompts[0][:shared])]), torch.arange(shared)[None])
        tokens = torch.tensor([rest + [stop_ids[0]] * (width - len(rest)) for rest in rests])
        places.slots = torch.arange(width).expand(len(rests), -1)
        hidden = _hidden(causal, places, tokens, places.slots + shared)
        hidden = hidden[torch.arange(len(rests)), lengths.to(hidden.device) - 1]
        answers: list[list[int]] = [[] for _ in prompts]
        alive = list(range(len(prompts)))
        stops = set(stop_ids)
        for step in range(max_new_tokens):
            chosen = choose(logits_of(causal, hidden))
            for row, token in zip(alive, chosen, strict=True):
                answers[row].append(token)
            going = [number for number, token in enumerate(chosen) if token not in stops]
            if not going or step == max_new_tokens - 1:
                break
            if len(going) < len(alive):
                places.keep(torch.tensor(going, device=hidden.device))
                alive = [alive[number] for number in going]
            places.slots = (lengths[alive] + step)[:, None]
            tokens = torch.tensor([[answers[row][-1]] for row in alive])
            hidden = _hidden(causal, places, tokens, places.slots + shared)[:, 0]
    finally:
        causal.set_attn_implementation(before)
    return answers


def _hidden(causal: Any, places: Places, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, L, hidden size) last hidden states."""
    device = causal.get_input_embeddings().weight.device
    if places.slots is not None:
        places.slots = places.slots.to(device)
    decoder, inputs = causal.get_decoder(), {"input_ids": ids.to(device), "position_ids": positions.to(device)}
    hidden: torch.Tensor = decoder(**inputs, decode_places=places, use_cache=False).last_hidden_state
    return hidden


def decode_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    decode_places: Places | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention interface of transformers: (B, H, L, D) in, (B, L, H, D) out. Keys and values are cached.

    Computes in float32 on a CPU: bf16 matmuls there are compiled separately for each number of positions.
    """
    if decode_places is None or attention_mask is not None or dropout:
        raise ValueError("decoding needs `decode_places`, and supports neither a mask nor attention dropout")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    dtype = value.dtype
    exact = torch.float32 if query.device.type == "cpu" and dtype != torch.float64 else dtype
    query, key, value = (each.to(exact) for each in (query, key, value))
    layer, slots = decode_places.layers[module.layer_idx], decode_places.slots
    if slots is None:
        layer.prefix = (key, value)
        key, value = repeat_heads(query, key), repeat_heads(query, value)
        result = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    elif layer.own is None:
        result = _first(query, key, value, layer, decode_places.room, scale)
    else:
        rows = torch.arange(len(slots), device=slots.device)
        for kept, new in zip(layer.own, (key, value), strict=True):
            kept[rows, :, slots[:, 0]] = new[:, :, 0]
        result = _next(query, layer, slots, scale)
    return result.to(dtype).transpose(1, 2), None


def _first(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: _Layer, room: int, scale: float) -> torch.Tensor:
    """All rows' suffixes: a token attends to the prefix and to earlier tokens of its row. Caches `room` positions per row."""
    batch, heads, length, size = key.shape
    made = [torch.zeros((batch, heads, room, size), dtype=key.dtype, device=key.device) for _ in range(2)]
    for kept, new in zip(made, (key, value), strict=True):
        kept[:, :, :length] = new
    layer.own = (made[0], made[1])
    if layer.prefix is None:
        key, value = repeat_heads(query, key), repeat_heads(query, value)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    before = layer.prefix[0].shape[2]
    seen = torch.ones((length, before + length), dtype=torch.bool, device=query.device).tril_(before)
    pairs = zip(layer.prefix, (key, value), strict=True)
    key, value = (repeat_heads(query, torch.cat([old.expand(batch, -1, -1, -1), new], 2)) for old, new in pairs)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)


def _next(query: torch.Tensor, layer: _Layer, slots: torch.Tensor, scale: float) -> torch.Tensor:
    """One token of each row: one matmul over the prefix for all rows, one over their own positions; one softmax over both."""
    if layer.own is None:
        raise AssertionError("the suffixes come first")
    key, value = layer.own
    batch, heads, length, size = key.shape
    grouped = query.view(batch, heads, -1, size)  # (B, K, H / K, D)
    own = (grouped @ key.transpose(2, 3)).mul_(scale)  # (B, K, H / K, S)
    behind = torch.arange(length, device=slots.device) > slots  # (B, S)
    own.masked_fill_(behind[:, None, None], float("-inf"))
    exact = torch.promote_types(own.dtype, torch.float32)
    if layer.prefix is None:
        return (own.to(exact).softmax(-1).to(value.dtype) @ value).view(query.shape)
    prefix_key, prefix_value = layer.prefix
    stacked = grouped.transpose(0, 1).reshape(1, heads, -1, size)  # (1, K, B H / K, D)
    shared = (stacked @ prefix_key.transpose(2, 3)).mul_(scale)  # (1, K, B H / K, P)
    before = shared.shape[-1]
    shared = shared.view(heads, batch, -1, before).transpose(0, 1)
    shares = torch.cat([shared, own], -1).to(exact).softmax(-1).to(value.dtype)
    of_prefix = shares[..., :before].transpose(0, 1).reshape(1, heads, -1, before) @ prefix_value
    mixed = of_prefix.view(heads, batch, -1, size).transpose(0, 1) + shares[..., before:] @ value
    return mixed.reshape(query.shape)


# Without a registered mask function, transformers makes no mask and passes None.
ALL_ATTENTION_FUNCTIONS.register(NAME, decode_attention)
