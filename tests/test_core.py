"""The exact core: credit, the packed pass and its gradients, sampling, the step and its limits."""

import contextlib
import gc
import json
import math
import os
import random
import re
import shutil
import sys
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    DEMO,
    FAST,
    Words,
    exact,
    random_completions,
    random_model,
    rows_of,
)

import tokenrl

HALF = [torch.float32, torch.bfloat16]
PROBLEM = tokenrl.Problem("q", "1")


def random_group(seed):
    rng = random.Random(seed)
    completions = random_completions(rng, rng.randint(2, 9), 7)
    rewards = [rng.choice([0.0, 1.0, rng.random()]) for _ in completions]
    return completions, rewards


def settings_of(**changes):
    plain = {"method": "grpo", "alpha": 2, "p": 0.5, "target_kl": 0.0, "max_new_tokens": 9}
    plain |= {"group_size": 8, "prompts_per_step": 2, "validate_every": 0}
    return tokenrl.Settings(**plain | changes)


# ---- trie and credit, against brute force over prefixes -----------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_trie_holds_each_prefix_once(seed):
    completions, _ = random_group(seed)
    facts = [[hash(tuple(c[: i + 1])) % 1009 for i in range(len(c))] for c in completions]
    trie = tokenrl.Trie(completions, facts, [[-x for x in row] for row in facts])
    prefixes = {tuple(c[: i + 1]) for c in completions for i in range(len(c))}
    assert len(trie.tokens) == len(prefixes)
    for completion, path, known in zip(completions, trie.paths, facts):
        assert [trie.tokens[n] for n in path] == completion
        assert [trie.depths[n] for n in path] == list(range(len(completion)))
        assert [trie.parents[n] for n in path] == [-1, *path[:-1]]
        assert [trie.entropies[n] for n in path] == known
        assert [trie.logprobs[n] for n in path] == [-x for x in known]
    assert all(parent < node for node, parent in enumerate(trie.parents))
    bare = tokenrl.Trie(completions)
    assert bare.paths == trie.paths and bare.entropies is None and bare.logprobs is None


def prefix_of(trie, node):
    tokens = []
    while node >= 0:
        tokens.append(trie.tokens[node])
        node = trie.parents[node]
    return tuple(reversed(tokens))


def assert_weights(trie, found, wanted):
    """`wanted` is {prefix: weight}."""
    found = {prefix_of(trie, node): weight for node, weight in found.items()}
    wanted = {key: value for key, value in wanted.items() if abs(value) > 1e-9}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, abs=1e-9)


def brute_advantages(rewards):
    tensor = torch.tensor(rewards, dtype=torch.float64)
    return ((tensor - tensor.mean()) / (tensor.std(unbiased=False) + 1e-4)).tolist()


def brute_grpo(completions, rewards, lengths):
    """{prefix: weight} where the first so many tokens of each completion are trained."""
    wanted = defaultdict(float)
    for completion, length, advantage in zip(completions, lengths, brute_advantages(rewards)):
        for t in range(length):
            wanted[tuple(completion[: t + 1])] += advantage / (len(completions) * length)
    return wanted


@pytest.mark.parametrize("seed", range(40))
def test_grpo_weights(seed):
    completions, rewards = random_group(seed)
    trie = tokenrl.Trie(completions)
    wanted = brute_grpo(completions, rewards, [len(c) for c in completions])
    assert_weights(trie, tokenrl.grpo_weights(trie, rewards), wanted)


@pytest.mark.parametrize("alpha, p, k", [(3, 0.0, None), (1, 1.0, 3), (0, 1.0, None), (2, 0.0, 2)])
@pytest.mark.parametrize("seed", range(10))
def test_s_grpo_weights_where_nothing_is_left_to_chance(seed, alpha, p, k):
    completions, rewards = random_group(seed)
    trie = tokenrl.Trie(completions)
    lengths = [min(len(c), alpha if p == 0 else k or 99) for c in completions]
    found = tokenrl.s_grpo_weights(trie, rewards, alpha, p, random.Random(seed), k)
    assert_weights(trie, found, brute_grpo(completions, rewards, lengths))


@pytest.mark.parametrize("alpha, p, k", [(2, 0.4, 4), (0, 0.7, 3), (1, 0.3, None), (3, 0.5, 3)])
def test_s_grpo_draws_its_positions_as_the_paper_says(alpha, p, k):
    """Each subset of positions as often as: t < alpha always, later ones with probability p as long
    as there are fewer than k. Completions share nothing here, so that a node tells its position."""
    length, group, draws = 6, 8, 600
    wanted = Counter()
    for coins in product([False, True], repeat=length):
        kept, chance = (), 1.0
        for t, coin in enumerate(coins):
            sure, full = t < alpha, k is not None and len(kept) == k
            chance *= 0.5 if sure or full else p if coin else 1 - p  # 0.5: this coin says nothing
            kept += (t,) if sure or coin and not full else ()
        wanted[kept] += chance
    assert sum(wanted.values()) == pytest.approx(1)

    trie = tokenrl.Trie([[i] * length for i in range(group)])
    rewards, rng, found = [float(i % 2) for i in range(group)], random.Random(0), Counter()
    advantages = brute_advantages(rewards)
    for _ in range(draws):
        weights = tokenrl.s_grpo_weights(trie, rewards, alpha, p, rng, k)
        for path, advantage in zip(trie.paths, advantages):
            kept = tuple(t for t, node in enumerate(path) if node in weights)
            found[kept] += 1
            for t in kept:
                assert weights[path[t]] == pytest.approx(advantage / (group * len(kept)))
    total = draws * group
    assert found.keys() <= wanted.keys()
    for kept, chance in wanted.items():
        noise = math.sqrt(chance * (1 - chance) / total)
        assert found[kept] / total == pytest.approx(chance, abs=4.5 * noise + 1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_t_spmo_weights(seed):
    completions, rewards = random_group(seed)

    def mean(prefix):
        passing = [r for c, r in zip(completions, rewards) if tuple(c[: len(prefix)]) == prefix]
        return sum(passing) / len(passing)

    prefixes = {tuple(c[: i + 1]) for c in completions for i in range(len(c))}
    credit = {prefix: mean(prefix) - mean(prefix[:-1]) for prefix in prefixes}
    credit = {prefix: value for prefix, value in credit.items() if abs(value) > 1e-9}
    wanted = {prefix: value / len(credit) for prefix, value in credit.items()}
    trie = tokenrl.Trie(completions)
    assert_weights(trie, tokenrl.t_spmo_weights(trie, rewards), wanted)
    logps = [[-len(set(c[: i + 1])) / 3 for i in range(len(c))] for c in completions]
    trie = tokenrl.Trie(completions, logprobs=logps)
    wanted = {c: value * math.exp(-len(set(c)) / 3) for c, value in wanted.items()}
    assert_weights(trie, tokenrl.t_spmo_weights(trie, rewards), wanted)


def test_equal_rewards_give_no_credit():
    trie, rng = tokenrl.Trie([[2, 3], [2, 4], [5]]), random.Random(0)
    for rewards in ([0.0] * 3, [1.0] * 3, [0.3] * 3):
        for method in ("grpo", "s-grpo", "t-spmo"):
            assert tokenrl.credit_function(settings_of(method=method))(trie, rewards, rng) == {}
        rollout = tokenrl.Rollout(PROBLEM, [4], [[2, 3], [2, 4], [5]], rewards)
        assert tokenrl.credit([rollout], lambda *_: {0: 1.0}, rng) == []


def test_methods_get_their_numbers_from_the_settings(tmp_path):
    completions, rewards = random_group(3)
    trie = tokenrl.Trie(completions)
    numbers = settings_of(method="s-grpo", alpha=1, p=1.0, k=2)
    found = tokenrl.credit_function(numbers)(trie, rewards, random.Random(0))
    assert_weights(
        trie, found, brute_grpo(completions, rewards, [min(2, len(c)) for c in completions])
    )
    with pytest.raises(tokenrl.UserError, match="--k 2"):
        tokenrl.credit_function(settings_of(method="s-grpo", alpha=3, k=2))
    with pytest.raises(tokenrl.UserError, match="ppo"):
        tokenrl.credit_function(settings_of(method="ppo"))


def test_a_method_of_the_users_own_is_used(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "def unsure(trie, rewards, rng, most=2):\n"
        "    assert rng.random() < 1 and len(rewards) == len(trie.paths) and trie.logprobs\n"
        "    nodes = sorted(range(len(trie.tokens)), key=lambda n: -trie.entropies[n])\n"
        "    return {n: 0.5 for n in nodes[:most]} | {nodes[-1]: 0.0}\n"
        "def lost(trie, rewards, rng):\n"
        "    return {len(trie.tokens): 1.0}\n"
    )
    rollout = tokenrl.Rollout(PROBLEM, [4], [[2, 3], [2, 4]], [1.0, 0.0])
    rollout.entropies, rollout.logprobs = [[0.1, 2.0], [0.1, 2.0]], [[-0.1, -1.0], [-0.1, -2.0]]
    method = tokenrl.credit_function(settings_of(method=f"{path}:unsure"))
    [(found, trie, weights)] = tokenrl.credit([rollout], method, random.Random(0))
    assert found is rollout and weights == {1: 0.5, 2: 0.5}  # what weighs nothing costs nothing
    assert tokenrl.method_name(f"{path}:unsure") == "unsure"
    lost = tokenrl.credit_function(settings_of(method=f"{path}:lost"))
    with pytest.raises(tokenrl.UserError, match="nodes of the trie"):
        tokenrl.credit([rollout], lost, random.Random(0))


# ---- the packed pass, against one plain forward per completion ----------------------------------


def plain_logprobs(model, prompt, completion, temperature=1.0):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    scores = (logits.float() / temperature).log_softmax(-1)
    return scores.gather(1, torch.tensor(completion)[:, None])[:, 0]


def lora(model, seed=1, size=0.1):
    """LoRA on the q, v of the last two layers with random B, so that gradients reach all of it."""
    model.name_or_path = "tiny"
    wrapped = tokenrl.add_lora(model, 4, 8, "q_proj,v_proj", 0.5)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, size)
    return wrapped


def trained_weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def assert_close_to(found, expected, share=1e-4):
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(found, expected, atol=share * expected.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("few_rows", [False, True])
def test_packed_logprobs_and_gradients(model, seed, few_rows, monkeypatch):
    if few_rows:  # logits in several pieces
        monkeypatch.setattr(tokenrl, "TRAINED_ROWS", 3)
    model, rng = lora(model), random.Random(seed)
    prompt = [rng.randrange(2, 97) for _ in range(rng.randint(1, 9))]
    completions = random_completions(rng, 6, 8)
    trie = tokenrl.Trie(completions)
    nodes = rng.sample(range(len(trie.tokens)), rng.randint(1, len(trie.tokens)))
    weights = torch.randn(len(nodes), generator=torch.Generator().manual_seed(seed))

    packed = tokenrl.packed_logprobs(model, prompt, trie, nodes)
    plain = {}
    for completion, path in zip(completions, trie.paths):
        plain.update(zip(path, plain_logprobs(model, prompt, completion)))
    wanted = torch.stack([plain[n] for n in nodes])
    torch.testing.assert_close(packed, wanted, atol=2e-5, rtol=1e-5)
    found = gradients(model, (weights * packed).sum())
    assert_close_to(found, gradients(model, (weights * wanted).sum()))


def test_packed_logprobs_with_temperature():
    model = random_model("qwen2")
    trie = tokenrl.Trie([[5, 6], [5, 7]])
    wanted = plain_logprobs(model, [3, 4], [5, 7], 0.7)
    found = tokenrl.packed_logprobs(model, [3, 4], trie, [0, 2], temperature=0.7)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def half_model(kind, dtype):
    """A model in half precision, with its LoRA in float32, and the same weights in float32."""
    model = lora(random_model(kind).to(dtype))
    whole = lora(random_model(kind).to(dtype).float())
    return model, whole


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_float16_gives_the_log_probs_and_gradients_of_float32(kind):
    """Also of a small loss: its gradients inside the model lie below what float16 can hold."""
    model, whole = half_model(kind, torch.float16)
    completions, rewards = random_group(3)
    trie = tokenrl.Trie(completions)
    nodes = list(range(len(trie.tokens)))
    logps = [tokenrl.packed_logprobs(m, [4, 5, 6], trie, nodes) for m in (model, whole)]
    assert (logps[0] - logps[1]).abs().max() < 5e-3
    rollout = tokenrl.Rollout(PROBLEM, [4, 5, 6], completions, rewards)
    found, expected = (
        step_gradient(m, [rollout], settings_of(), groups=2000)[2] for m in (model, whole)
    )
    assert 0 < expected.norm() < 1e-2 and (found - expected).norm() < 0.03 * expected.norm()


def test_pack_holds_only_what_is_needed():
    trie = tokenrl.Trie([[2, 3, 4, 5], [2, 6, 7]])
    assert tokenrl.ancestors(trie, [1, 4]) == {0} and tokenrl.ancestors(trie, [3, 5]) == {
        0,
        1,
        2,
        4,
    }
    ids, positions, hidden, slot = tokenrl.pack([9, 9], trie, [1, 4])  # the branch: 3 and 6 after 2
    assert ids[:3].tolist() == [9, 9, 2] and positions[:3].tolist() == [0, 1, 2]
    assert (~hidden[:3, :3]).tolist() == [[True, False, False], [True, True, False], [True] * 3]
    assert slot[-1] == 1 and slot[0] == 2


@pytest.mark.parametrize("seed", range(5))
def test_a_row_of_the_pack_sees_its_own_ancestors_and_padding_only_itself(seed):
    completions, _ = random_group(seed)
    prompt, trie = [9] * (seed + 1), tokenrl.Trie(completions)
    nodes = random.Random(seed).sample(range(len(trie.tokens)), len(trie.tokens) // 2 + 1)
    ids, positions, hidden, slot = tokenrl.pack(prompt, trie, nodes)
    start, above = len(prompt), tokenrl.ancestors(trie, nodes)
    assert len(ids) == len(positions) == len(hidden) == hidden.shape[1]
    assert slot.keys() == above | {-1} and not hidden.diagonal().any()
    for node in above:
        seen = set(range(start)) | {slot[n] for n in tokenrl.ancestors(trie, [node]) | {node}}
        assert set((~hidden[slot[node]]).nonzero()[:, 0].tolist()) == seen
        assert (
            ids[slot[node]] == trie.tokens[node]
            and positions[slot[node]] == start + trie.depths[node]
        )
    for row in range(start + len(above), len(ids)):
        assert (~hidden[row]).nonzero()[:, 0].tolist() == [row]
        assert hidden[:row, row].all() and hidden[row + 1 :, row].all()


@pytest.mark.parametrize("dtype", [*HALF, torch.float16])
def test_packs_of_every_length_are_finite(dtype):
    model, trie = random_model("qwen2").to(dtype), tokenrl.Trie([[5, 6, 7]])
    for length in range(1, 34):
        assert tokenrl.packed_logprobs(model, [3] * length, trie, [0, 1, 2]).isfinite().all()


def test_a_trained_output_embedding_gets_its_gradient_too():
    model, (completions, _) = random_model("qwen2"), random_group(4)
    trie = tokenrl.Trie(completions)
    nodes = list(range(len(trie.tokens)))
    tokenrl.packed_logprobs(model, [5, 6], trie, nodes).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    seen = set()
    for path, completion in zip(trie.paths, completions):  # each node once
        new = [i for i, node in enumerate(path) if node not in seen]
        plain_logprobs(model, [5, 6], completion)[new].sum().backward()
        seen.update(path)
    for name, p in model.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, atol=1e-4, rtol=1e-3)


def test_an_empty_prompt_is_refused():
    with pytest.raises(tokenrl.UserError, match="prompt is empty"):
        tokenrl.packed_logprobs(random_model("qwen2"), [], tokenrl.Trie([[5, 6]]), [0, 1])


def test_what_is_longer_than_window_or_context_is_refused(words):
    with pytest.raises(tokenrl.UserError, match="window.* 64|64.* window"):
        tokenrl.packed_logprobs(random_model("gemma3"), [5], tokenrl.Trie([[*range(2, 70)]]), [66])
    with pytest.raises(tokenrl.UserError, match="515 tokens.* context.* 512"):
        tokenrl.sample(random_model("qwen2"), words, [[5] * 500], max_new_tokens=15)


def test_a_token_that_the_model_lacks_is_refused(words):
    """Tokens that were added to a tokenizer alone."""
    model, limit = random_model("qwen2"), dict(max_new_tokens=2)
    assert len(tokenrl.sample(model, words, [[5], [96]], 1, **limit)) == 2
    with pytest.raises(tokenrl.UserError, match="token that the model lacks"):
        tokenrl.sample(model, words, [[5], [5, 97, 5]], 1, **limit)


def test_nodes_that_nobody_weighs_ask_for_no_logprobs():
    found = tokenrl.packed_logprobs(random_model("qwen2"), [3, 4], tokenrl.Trie([[5]]), [])
    assert found.shape == (0,)


def test_packs_may_fill_the_context():
    model = random_model("qwen2")
    model.config.max_position_embeddings = 6
    trie = tokenrl.Trie([[5, 6, 7, 8]])
    tokenrl.packed_logprobs(model, [2, 3, 4], trie, [2])
    with pytest.raises(tokenrl.UserError, match="7 tokens"):
        tokenrl.packed_logprobs(model, [2, 3, 4], trie, [3])


# ---- the start-up check -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALF, torch.float16])
def test_check_model_accepts_exact_models(model, dtype):
    tokenrl.check_model(model.to(dtype), range(97))


def scaled(model, monkeypatch, factor):
    """A model that scales its logits, unknown to us."""
    forward = model.forward

    def scale(*args, **options):
        output = forward(*args, **options)
        output.logits = output.logits * factor
        return output

    monkeypatch.setattr(model, "forward", scale)


def decoder_with(model, monkeypatch, change):
    """A model whose decoder meets other arguments than those it was given."""
    decoder = model.get_decoder()
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda **options: forward(**change(options)))


def without(name):
    return lambda options: {key: value for key, value in options.items() if key != name}


def shifted(options):
    positions = options.get("position_ids")
    return options | ({} if positions is None else {"position_ids": 2 * positions})


def neighbours(model, monkeypatch):
    """A layer that looks at its neighbour whatever the mask says."""
    layer = model.get_decoder().layers[0]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, *a, **k: forward(x + x.roll(1, 1), *a, **k))


WEAK = {"gemma2"}  # its soft cap flattens everything
FAULTS = {
    "logits too small": lambda model, patch: scaled(model, patch, 0.98),
    "logits too large": lambda model, patch: scaled(model, patch, 1.015),
    "mask ignored": lambda model, patch: decoder_with(model, patch, without("attention_mask")),
    "positions ignored": lambda model, patch: decoder_with(model, patch, without("position_ids")),
    "positions shifted": lambda model, patch: decoder_with(model, patch, shifted),
    "neighbours seen": neighbours,
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_check_model_refuses_inexact_models(kind, fault, dtype, monkeypatch):
    if kind in WEAK and dtype != torch.float32 and "positions" in fault:
        pytest.skip("positions change this model's logits by less than rounding does")
    model = random_model(kind).to(dtype)
    FAULTS[fault](model, monkeypatch)
    with pytest.raises(tokenrl.UserError, match="not fit the packed update"):
        tokenrl.check_model(model, range(97))


@pytest.mark.parametrize("dtype", HALF)
def test_check_model_compares_what_is_sampled_too(dtype, monkeypatch):
    """A model that is exact as packed, and wrong from its cache."""
    model = random_model("qwen2").to(dtype)

    def shift(options):
        cached = options.get("use_cache") and options["input_ids"].shape[1] == 1
        return options | ({"position_ids": options["position_ids"] + 3} if cached else {})

    decoder_with(model, monkeypatch, shift)
    with pytest.raises(tokenrl.UserError, match="not fit the packed update"):
        tokenrl.check_model(model, range(97))


@pytest.mark.parametrize("dtype", HALF)
def test_check_model_compares_what_is_packed_too(dtype, monkeypatch):
    """A model that is exact from its cache, and takes no mask of its own."""
    model = random_model("qwen2").to(dtype)

    def forget(options):
        return options if options.get("use_cache") else without("attention_mask")(options)

    decoder_with(model, monkeypatch, forget)
    with pytest.raises(tokenrl.UserError, match="not fit the packed update"):
        tokenrl.check_model(model, range(97))


def test_check_model_refuses_what_it_cannot_run():
    torch.manual_seed(0)
    shape = dict(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2)
    config = transformers.MambaConfig(**shape, eos_token_id=1, pad_token_id=0)
    with pytest.raises(tokenrl.UserError, match="mamba.* not fit the packed update"):
        tokenrl.check_model(transformers.MambaForCausalLM(config).eval(), range(97))


def test_layers_that_share_keys_and_values(words):
    torch.manual_seed(0)
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=64)
    shape |= dict(num_kv_shared_layers=2, hidden_size_per_layer_input=8, laurel_rank=4)
    shape |= dict(vocab_size_per_layer_input=97, altup_num_inputs=2, eos_token_id=1, pad_token_id=0)
    shape |= dict(layer_types=["sliding_attention", "full_attention"] * 2)
    config = transformers.Gemma3nTextConfig(**shape, activation_sparsity_pattern=None)
    model = transformers.Gemma3nForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    tokenrl.check_model(model, range(97))
    assert_greedy_equals_generate(model, words, [[5, 6, 7, 8], [5, 6, 9]], 6)


def test_models_with_numbers_that_are_not_finite_are_named(tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(DEMO, folder)
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    key = min(weights)
    weights[key].view(-1)[3] = math.nan
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.raises(tokenrl.UserError, match=f"(?s)broken.*not finite.*{re.escape(key)}"):
        tokenrl.load_model(str(folder), "cpu")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_models_with_weights_of_a_byte_are_refused(dtype):
    weights = [("norm", torch.ones(2)), ("q_proj", torch.ones(2, 2).to(dtype))]
    with pytest.raises(tokenrl.UserError, match="tiny is quantized"):
        tokenrl.check_finite(weights, "tiny")


# ---- LoRA and adapter files ---------------------------------------------------------------------


def test_lower_layers_store_nothing():
    model = tokenrl.add_lora(random_model("qwen2"), 4, 8, "q_proj,v_proj", 1 / 3)
    needs = [layer.self_attn.q_proj for layer in tokenrl.base_of(model).model.layers]
    assert [hasattr(module, "lora_A") for module in needs] == [False, False, False, True]


def test_all_linear_means_every_matrix_of_the_last_layers(model):
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    wrapped = tokenrl.add_lora(model, 4, 8, "all-linear", 0.5)
    found = {
        re.sub(r"^base_model.model.|.lora_A.default.weight$", "", name)
        for name, p in wrapped.named_parameters()
        if p.requires_grad and "lora_A" in name
    }
    assert found == {name for name in names if re.search(r"layers\.[23]\.", name)}
    assert len(found) == 2 * 7


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "q_proj,lm_head", "qproj"])
def test_targets_outside_of_the_layers_are_refused_with_the_reason(target):
    with pytest.raises(tokenrl.UserError) as error:
        tokenrl.add_lora(random_model("qwen2"), 4, 8, target, 0.5)
    said = str(error.value)
    assert target.split(",")[-1] in said and "layers" in said and "q_proj" in said.split(target)[-1]
    assert "no module" in said and "all-linear" in said


def test_a_model_without_a_list_of_layers_is_refused(tmp_path):
    """GPT-2 passes the start-up check; its layers are `h`."""
    shape = dict(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=1)
    model, other = (
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval() for _ in range(2)
    )
    tokenrl.check_model(model, range(97))
    with pytest.raises(tokenrl.UserError, match="LoRA does not fit this model"):
        tokenrl.add_lora(model, 4, 8, "all-linear", 0.5)
    model.name_or_path = "tiny"
    peft.get_peft_model(model, peft.LoraConfig(r=4)).save_pretrained(tmp_path)
    with pytest.raises(tokenrl.UserError, match="does not fit tiny"):
        tokenrl.load_adapter(other, tmp_path, "default", "tiny", trainable=True)


@pytest.fixture
def saved(tmp_path):
    """(run, model): a trained adapter as save_run leaves it."""
    model = lora(random_model("qwen2"))
    optimizer = tokenrl.new_optimizer(model)
    state = tokenrl.load_state(tmp_path, model, optimizer)
    take_step(model, optimizer, settings_of())
    tokenrl.save_run(tmp_path, model, optimizer, state | {"step": 3}, keep=True)
    tokenrl.write_jsonl(tmp_path / "metrics.jsonl", [{"step": step} for step in (1, 2, 3)])
    return tmp_path, model


def tiny():
    model = random_model("qwen2")
    model.name_or_path = "tiny"
    return model


def kept_and_gradients(model, trie):
    """(bytes that autograd keeps of a packed pass, the gradients after it)"""
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
    )
    with keep:
        loss = tokenrl.packed_logprobs(model, [3, 4], trie, range(len(trie.tokens))).sum()
    return sum(kept), gradients(model, loss)


@pytest.mark.parametrize("loaded", [False, True])
def test_layers_keep_their_input_alone_for_the_backward_pass(loaded, saved, monkeypatch):
    trie, found = tokenrl.Trie(random_completions(random.Random(0), 6, 8)), []
    for change in (lambda model: model, tokenrl.recomputing):
        monkeypatch.setattr(tokenrl, "recomputing", change)
        model = lora(tiny())
        if loaded:
            model = tokenrl.load_adapter(tiny(), saved[0], "default", "tiny", trainable=True)
        found.append(kept_and_gradients(model, trie))
    (whole, expected), (lean, same) = found
    assert lean < whole / 3
    assert torch.equal(same, expected) and same.any()


def test_an_adapter_comes_back_as_it_was_saved(saved):
    run, model = saved
    again = tokenrl.load_adapter(tiny(), run, "default", "tiny", trainable=True)
    assert torch.equal(trained_weights(again), trained_weights(model))
    other = tokenrl.load_adapter(again, run, "second", "tiny")  # beside another one
    other.set_adapter("second")
    found, wanted = (plain_logprobs(m, [4, 5], [6, 7]) for m in (other, model))
    torch.testing.assert_close(found, wanted)
    with pytest.raises(tokenrl.UserError, match="made for tiny"):
        tokenrl.load_adapter(tiny(), run, "default", "else")


def rename(weights):
    return {key.replace("q_proj", "k_proj"): value for key, value in weights.items()}


def lose(weights):
    return {key: value for key, value in weights.items() if key != min(weights)}


def add(weights):
    return weights | {min(weights).replace("layers.2", "layers.0"): weights[min(weights)].clone()}


def poison(weights):
    return {key: value.clone().fill_(math.nan) for key, value in weights.items()}


def flatten(weights):
    """Matrices of rank 1, which torch would repeat without a word."""
    return {k: v[:1].clone() if "lora_A" in k else v[:, :1].clone() for k, v in weights.items()}


@pytest.mark.parametrize("damage", [rename, lose, add, poison, flatten, None])
@pytest.mark.parametrize("beside", [False, True])
def test_adapter_files_that_do_not_fit_are_refused(saved, damage, beside):
    run, model = saved
    path = run / "adapter_model.safetensors"
    if damage:
        safetensors.torch.save_file(damage(safetensors.torch.load_file(path)), path)
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(tokenrl.UserError, match="does not fit tiny|not finite"):
        tokenrl.load_adapter(model if beside else tiny(), run, "other", "tiny")


@pytest.mark.parametrize("change", [{"modules_to_save": ["norm"]}, {"bias": "lora_only"}])
def test_whole_modules_are_not_trained_in_16_bits(tmp_path, change):
    """Adam's small steps are lost there, and its epsilon is 0 in float16; LoRA itself is float32."""
    for name, options in (("whole", change), ("lora", {})):
        config = peft.LoraConfig(target_modules=["q_proj"], **options)
        peft.get_peft_model(tiny(), config).save_pretrained(tmp_path / name)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(tokenrl.UserError, match="--dtype float32"):
            load = tiny().to(dtype), tmp_path / "whole", "default", "tiny"
            tokenrl.load_adapter(*load, trainable=True)
        tokenrl.load_adapter(tiny().to(dtype), tmp_path / "whole", "default", "tiny")
        load = tiny().to(dtype), tmp_path / "lora", "default", "tiny"
        tokenrl.load_adapter(*load, trainable=True)
    tokenrl.load_adapter(tiny(), tmp_path / "whole", "default", "tiny", trainable=True)


def test_an_adapter_without_weights_is_not_asked_of_the_hub(saved):
    (saved[0] / "adapter_model.safetensors").unlink()
    with pytest.raises(tokenrl.UserError, match="adapter_model.safetensors"):
        tokenrl.load_adapter(tiny(), saved[0], "default", "tiny")


def test_a_state_comes_back_as_it_was_saved(saved):
    run, model = saved
    again = lora(random_model("qwen2"), seed=2)
    optimizer = tokenrl.new_optimizer(again)
    assert tokenrl.load_state(run, again, optimizer)["step"] == 3
    assert torch.equal(trained_weights(again), trained_weights(model))
    moments = [state["exp_avg"] for state in optimizer.state_dict()["state"].values()]
    assert moments and all(moment.abs().max() > 0 for moment in moments)


@pytest.mark.parametrize("damage", [rename, lose, add, poison, flatten])
def test_states_that_do_not_fit_are_refused(saved, damage):
    run, model = saved
    state = torch.load(run / "state.pt", weights_only=True)
    torch.save(state | {"weights": damage(state["weights"])}, run / "state.pt")
    with pytest.raises(tokenrl.UserError, match=re.escape(str(run))):
        tokenrl.load_state(run, model, tokenrl.new_optimizer(model))


def test_shares_of_layers_are_rounded():
    model = tokenrl.add_lora(random_model("qwen2"), 4, 8, "q_proj", 0.65)
    assert model.peft_config["default"].layers_to_transform == [1, 2, 3]


# ---- the step -----------------------------------------------------------------------------------


def step_gradient(model, rollouts, settings, seed=5, groups=None):
    """(weights by group, what update() reports, the gradient that it hands to the optimizer)"""
    seen = []
    optimizer = tokenrl.new_optimizer(model)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.requires_grad])
        )
    )
    method = tokenrl.credit_function(settings)
    credited = tokenrl.credit(rollouts, method, random.Random(seed))
    policy = tokenrl.Policy(model, None, "chat")
    sums, peaks = tokenrl.update(policy, credited, groups or len(rollouts), optimizer, settings)
    return credited, sums | peaks, seen[0]


def clipped(gradient):
    return gradient / max(1.0, gradient.norm().item())


def random_step():
    """Groups whose prompts begin alike, one of them a replay from inside another, one without
    signal, one apart."""
    (completions, rewards), (others, other_rewards) = random_group(3), random_group(8)
    return [
        tokenrl.Rollout(PROBLEM, [4, 5, 6], completions, rewards),
        tokenrl.Rollout(PROBLEM, [4, 5, 6, *completions[0][:2]], others, other_rewards),
        tokenrl.Rollout(PROBLEM, [4, 5], completions, [1.0] * len(rewards)),
        tokenrl.Rollout(PROBLEM, [4, 7], others, other_rewards),
        tokenrl.Rollout(PROBLEM, [9], completions, rewards),
    ]


def take_step(model, optimizer, settings, lr=1e-3):
    """One update of the model on random_step; returns the report."""
    credited = tokenrl.credit(
        random_step(), tokenrl.credit_function(settings), random.Random(settings.seed)
    )
    optimizer.param_groups[0]["lr"] = lr
    policy = tokenrl.Policy(model, None, "chat")
    sums, peaks = tokenrl.update(policy, credited, 5, optimizer, settings)
    return sums | peaks


@pytest.mark.parametrize("budget, temperature", [(1024, 1.0), (1024, 0.7), (9, 0.7), (1, 1.0)])
@pytest.mark.parametrize("method", ["grpo", "t-spmo"])
def test_update_is_the_policy_gradient(method, budget, temperature):
    """One step's gradient, through update(), against the formula written over completions with
    plain forwards, however the step is cut into packs."""
    model, rollouts = lora(random_model("qwen2"), size=0.02), random_step()
    settings = settings_of(method=method, max_pack_tokens=budget, temperature=temperature)
    credited, report, found = step_gradient(model, rollouts, settings)

    loss, nodes = 0.0, set()
    for rollout in rollouts:
        if not rollout.has_signal:
            continue
        trie, rewards = tokenrl.Trie(rollout.completions), rollout.rewards
        logps = [plain_logprobs(model, rollout.prompt, c, temperature) for c in rollout.completions]
        if method == "t-spmo":
            weights = tokenrl.t_spmo_weights(trie, rewards)
            by_node = dict(pair for path, row in zip(trie.paths, logps) for pair in zip(path, row))
            loss = loss - sum(w * by_node[n] for n, w in weights.items())
            nodes |= {(*rollout.prompt, *prefix_of(trie, n)) for n in weights}
            continue
        nodes |= {
            (*rollout.prompt, *prefix_of(trie, n)) for n in tokenrl.grpo_weights(trie, rewards)
        }
        for row, advantage in zip(logps, brute_advantages(rewards)):
            loss = loss - advantage * row.mean() / len(logps)
    expected = gradients(model, loss / len(rollouts))
    assert_close_to(found, clipped(expected))
    assert report["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
    assert report["loss"] == pytest.approx(loss.item() / len(rollouts), rel=1e-3)
    assert report["tokens_trained"] == len(nodes)  # a replay can meet nodes of its first group


def test_a_long_gradient_is_clipped_and_nothing_else_shrinks_the_weights():
    model = lora(random_model("qwen2"))
    rollouts = random_step()
    _, report, found = step_gradient(model, rollouts, settings_of(), groups=1e-3)
    assert report["grad_norm"] > 10 and found.norm().item() == pytest.approx(1, rel=1e-3)
    assert tokenrl.new_optimizer(model).defaults["weight_decay"] == 0


def test_t_spmo_is_trained_on_pi():
    """Where the rollout knows log-probs, the gradient is that of credit times pi, not log pi; the
    loss itself knows no method."""
    model, loss = lora(random_model("qwen2")), 0.0
    rollouts = random_step()[:1] + random_step()[3:]
    for rollout in rollouts:
        logps = [plain_logprobs(model, rollout.prompt, c, 0.7) for c in rollout.completions]
        trie = tokenrl.Trie(rollout.completions)
        rollout.logprobs = [row.tolist() for row in logps]
        rollout.entropies = [[0.0] * len(row) for row in logps]
        by_node = dict(pair for path, row in zip(trie.paths, logps) for pair in zip(path, row))
        weights = tokenrl.t_spmo_weights(trie, rollout.rewards)
        loss = loss - sum(w * by_node[n].exp() for n, w in weights.items()) / len(rollouts)
    expected = clipped(gradients(model, loss))
    model.zero_grad()
    settings = settings_of(method="t-spmo", temperature=0.7)
    assert_close_to(step_gradient(model, rollouts, settings)[2], expected)


def test_the_loss_is_weight_times_log_prob_whatever_the_method():
    for method in ("grpo", "s-grpo", "t-spmo"):
        model, rollouts = lora(random_model("qwen2")), random_step()
        credited, _, found = step_gradient(model, rollouts, settings_of(method=method))
        loss = 0.0
        for rollout, trie, weights in credited:
            logps = tokenrl.packed_logprobs(model, rollout.prompt, trie, list(weights))
            loss = loss - (torch.tensor(list(weights.values())) * logps).sum() / len(rollouts)
        assert_close_to(found, clipped(gradients(model, loss)))
        assert len(credited) == 4


@pytest.mark.parametrize("seed", range(10))
def test_split_nodes_covers_all_within_the_budget(seed):
    rng = random.Random(seed)
    trie = tokenrl.Trie(random_completions(rng, 9, 8))
    nodes = rng.sample(range(len(trie.tokens)), len(trie.tokens) // 2)
    parts = list(tokenrl.split_nodes(trie, nodes, 10))
    assert sorted(sum(parts, [])) == sorted(nodes)
    assert all(len(tokenrl.ancestors(trie, part)) <= 10 for part in parts)
    assert list(tokenrl.split_nodes(trie, [], 10)) == []


def partitions(items):
    if not items:
        yield []
        return
    first, *rest = items
    for parts in partitions(rest):
        yield [[first], *parts]
        for i in range(len(parts)):
            yield [*parts[:i], [first, *parts[i]], *parts[i + 1 :]]


def fewest_passes(trie, nodes, budget):
    """By brute force; what one completion needs stays together, however long."""
    needed = set()
    for path in trie.paths:
        deep = [t for t, node in enumerate(path) if node in set(nodes)]
        needed |= {frozenset(path[: deep[-1]])} if deep else set()
    needed = [one for one in needed if not any(one < other for other in needed)]
    return min(
        len(parts)
        for parts in partitions(needed)
        if all(len(part) == 1 or len(frozenset().union(*part)) <= budget for part in parts)
    )


@pytest.mark.parametrize("seed", range(60))
def test_split_nodes_takes_at_most_twice_the_passes_that_it_needs(seed):
    rng = random.Random(seed)
    begin = [[rng.randrange(2, 5)] * rng.randint(1, 20) for _ in range(3)]
    completions = random_completions(rng, rng.randint(2, 7), rng.choice([8, 30]))
    completions = [rng.choice(begin) + c if seed % 2 else c for c in completions]
    trie, budget = tokenrl.Trie(completions), rng.choice([5, 10, 25])
    nodes = rng.sample(range(len(trie.tokens)), rng.randint(1, len(trie.tokens)))
    parts = list(tokenrl.split_nodes(trie, nodes, budget))
    assert sorted(sum(parts, [])) == sorted(nodes)
    assert len(parts) <= 2 * fewest_passes(trie, nodes, budget)


@pytest.mark.parametrize(
    "completions, budget, passes",
    [
        ([[i] * 1200 for i in range(8)], 1024, 8),  # a long path stays whole
        ([[i] * 1024 for i in range(16)], 512, 16),
        ([[i] * 100 for i in range(16)], 512, 4),
        ([[i % 2] * 600 + [9 + i] * 100 for i in range(8)], 1024, 2),  # by turns in two beginnings
    ],
)
def test_passes_of_long_completions(completions, budget, passes):
    trie = tokenrl.Trie(completions)
    nodes = range(len(trie.tokens))
    assert len(list(tokenrl.split_nodes(trie, list(nodes), budget))) == passes
    rollout = tokenrl.Rollout(PROBLEM, [5], completions, [0.0] * len(completions))
    packs = list(tokenrl.step_packs([(rollout, trie, dict.fromkeys(nodes, 1.0))], budget))
    assert len(packs) == passes and sum(len(weights) for _, weights in packs) == len(trie.tokens)


@pytest.mark.parametrize("begin, shared", [([], 0), ([1], 1), ([1] * 90, 90)])
def test_long_questions_do_not_make_more_passes(begin, shared):
    """The budget is the completions', whatever of the prompts is shared; that is packed once."""
    credited = []
    for number in range(4):
        completions = [[10 * number + i] * 60 for i in range(10, 18)]
        prompt = begin + [2 + number] * (100 - len(begin))
        trie = tokenrl.Trie(completions)
        weights = dict.fromkeys(range(len(trie.tokens)), 1.0)
        rollout = tokenrl.Rollout(PROBLEM, prompt, completions, [0.0] * 8)
        credited.append((rollout, trie, weights))
    packs = list(tokenrl.step_packs(credited, 240))
    assert len(packs) == 8 and sum(len(weights) for _, weights in packs) == 4 * 8 * 60
    for trie, weights in packs:
        assert len(trie.tokens) == shared + 4 * (100 - shared) + 4 * 8 * 60
        assert len(tokenrl.ancestors(trie, weights)) <= 100 + 240


def test_kl_is_zero_at_the_base_and_pulls_back_to_it():
    """--beta weighs the mean of exp(gap) - gap - 1 over the trained tokens, however packed."""
    trie_of = [[7, 9], [8]]
    for budget in (1024, 1):
        model = lora(random_model("qwen2"))
        rollout = tokenrl.Rollout(PROBLEM, [4, 5], trie_of, [1.0, 0.0])
        options = dict(temperature=0.7, max_pack_tokens=budget)
        without = step_gradient(model, [rollout], settings_of(**options), groups=50)
        found = step_gradient(model, [rollout], settings_of(**options, beta=0.05), groups=50)
        logps = torch.cat([plain_logprobs(model, [4, 5], c, 0.7) for c in trie_of])
        with torch.no_grad(), model.disable_adapter():
            gap = (
                torch.cat([plain_logprobs(model, [4, 5], c, 0.7) for c in trie_of]) - logps.detach()
            )
        kl = 0.05 * (gap.exp() - gap - 1).mean()
        assert found[1]["grad_norm"] < 1 and kl > 1e-5
        assert found[1]["loss"] - without[1]["loss"] == pytest.approx(kl.item(), rel=1e-2)
        wanted = gradients(model, 0.05 * (logps * (1 - gap.exp())).mean())
        assert_close_to(found[2] - without[2], wanted, 1e-3)
    fresh = tokenrl.add_lora(random_model("qwen2"), 4, 8, "q_proj", 0.5)
    with_kl, plain = (step_gradient(fresh, [rollout], settings_of(beta=b))[1] for b in (1.0, 0.0))
    assert with_kl["loss"] == pytest.approx(plain["loss"], abs=1e-6)


def test_nothing_to_train_leaves_everything_as_it_is():
    """Not even Adam's momentum moves the weights."""
    model = lora(random_model("qwen2"))
    optimizer = tokenrl.new_optimizer(model)
    take_step(model, optimizer, settings_of())
    before, steps = trained_weights(model), [float(s["step"]) for s in optimizer.state.values()]
    settings = settings_of(beta=0.5, target_kl=0.003)
    sums, peaks = tokenrl.update(tokenrl.Policy(model, None, "chat"), [], 4, optimizer, settings)
    assert torch.equal(trained_weights(model), before)
    assert [float(s["step"]) for s in optimizer.state.values()] == steps
    assert sums["tokens_trained"] == sums["loss"] == 0 and not peaks["skipped"]


def test_non_finite_gradient_is_skipped_and_leaves_the_adapter_alone():
    model = lora(random_model("qwen2"))
    optimizer, before = tokenrl.new_optimizer(model), trained_weights(model)
    optimizer.param_groups[0]["lr"] = 0.1
    rollout = tokenrl.Rollout(PROBLEM, [4, 5], [[7, 9], [8]], [1.0, 0.0])
    for bad in (math.nan, math.inf):
        with pytest.raises(tokenrl.UserError, match="finite"):
            tokenrl.credit([rollout], lambda *_: {0: bad, 1: 1.0}, random.Random(0))  # noqa: B023
        credited = [(rollout, tokenrl.Trie(rollout.completions), {0: bad, 1: 1.0})]
        policy = tokenrl.Policy(model, None, "chat")
        _, peaks = tokenrl.update(policy, credited, 1, optimizer, settings_of())
        assert peaks["skipped"] and torch.equal(trained_weights(model), before)
        assert all(p.grad is None for p in model.parameters()) and not optimizer.state


# ---- how far a step may go ----------------------------------------------------------------------


def step_of(lr, target_kl, steps=1, **changes):
    """(model, report, measured KL of the last step over all nodes, trained or not)"""
    model = lora(random_model("qwen2"))
    optimizer = tokenrl.new_optimizer(model)
    settings = settings_of(target_kl=target_kl, temperature=0.7, **changes)
    rollouts = [r for r in random_step() if r.prompt[0] == 4]  # one pack
    credited = tokenrl.credit(rollouts, tokenrl.credit_function(settings), random.Random(0))
    optimizer.param_groups[0]["lr"] = lr
    for _ in range(steps):
        before = [by_prefix(model, credited)]
        policy = tokenrl.Policy(model, None, "chat")
        _, report = tokenrl.update(policy, credited, len(rollouts), optimizer, settings)
    after = by_prefix(model, credited)
    gaps = torch.tensor([after[prefix] - before[0][prefix] for prefix in after])
    return model, report, (gaps.expm1() - gaps).mean().item()


def by_prefix(model, credited):
    """{prompt and prefix: log-prob} of all nodes, by plain forward passes."""
    found = {}
    for rollout, *_ in credited:
        for completion in rollout.completions:
            with torch.no_grad():
                logps = plain_logprobs(model, rollout.prompt, completion, 0.7).double().tolist()
            for t, logp in enumerate(logps):
                found[tuple(rollout.prompt + completion[: t + 1])] = logp
    return found


@pytest.mark.parametrize("method", ["grpo", "t-spmo"])
@pytest.mark.parametrize("lr", [0.1, 1.0, 30.0])
def test_no_step_goes_further_than_the_target(lr, method):
    free = step_of(lr, 0.0, method=method)[2]
    _, report, kl = step_of(lr, 0.003, method=method)
    assert free > 0.02 and 0.0003 < kl < 0.003 * 1.01  # neither too far nor given up
    assert report["kl"] == pytest.approx(kl, rel=1e-2) and not report["skipped"]
    assert step_of(lr, 0.003, steps=3, method=method)[2] < 0.003 * 1.01


def test_the_share_of_a_step_lies_on_its_way():
    start = trained_weights(lora(random_model("qwen2")))
    whole, part = (trained_weights(step_of(1.0, target)[0]) - start for target in (0.0, 0.003))
    share = part.norm() / whole.norm()
    assert 0.001 < share < 0.5
    torch.testing.assert_close(part, whole * share, atol=1e-5, rtol=1e-2)


def test_a_small_step_is_left_as_it_is():
    (free, _, _), (held, report, kl) = (step_of(1e-3, target) for target in (0.0, 0.003))
    assert torch.equal(trained_weights(free), trained_weights(held))
    assert report["kl"] == pytest.approx(kl, rel=1e-2) and 0 < kl < 0.003


def test_without_a_target_a_step_is_adams():
    model = lora(random_model("qwen2"))
    credited, _, gradient = step_gradient(model, random_step(), settings_of())
    start = trained_weights(model)
    weight = torch.nn.Parameter(start.clone())
    weight.grad = gradient
    torch.optim.AdamW([weight], lr=0.5, weight_decay=0).step()
    optimizer = tokenrl.new_optimizer(model)
    report = take_step(model, optimizer, settings_of(target_kl=0.0), lr=0.5)
    torch.testing.assert_close(trained_weights(model), weight.detach(), atol=1e-4, rtol=1e-4)
    assert (trained_weights(model) - start).abs().max() > 0.4 and not report["skipped"]


def test_the_same_state_gives_the_same_step():
    first, second = (step_of(1.0, 0.003, steps=2) for _ in range(2))
    assert torch.equal(trained_weights(first[0]), trained_weights(second[0]))
    assert first[1:] == second[1:]


def test_a_step_that_no_share_can_save_is_taken_back():
    for lr in (1e12, 1e20, 1e36):
        model, report, kl = step_of(lr, 0.003)
        assert report["skipped"] and kl == 0
        assert torch.equal(trained_weights(model), trained_weights(lora(random_model("qwen2"))))


# ---- sampling -----------------------------------------------------------------------------------


def assert_greedy_equals_generate(model, words, prompts, length, **options):
    found = tokenrl.sample(
        model, words, prompts, 2, max_new_tokens=length, temperature=0, rows=6, **options
    )
    for prompt, group in zip(prompts, found):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False)
        wanted = whole[0, len(prompt) :].tolist()
        assert group == [wanted, wanted]


def test_greedy_equals_generate(model, words):
    rng = random.Random(0)
    prompts = [[rng.randrange(2, 97) for _ in range(n)] for n in (3, 9, 5, 1, 12)]
    shared = [rng.randrange(2, 97) for _ in range(6)]
    prompts += [shared, shared + [7], shared + [8, 9, 7], shared + [7, 9]]  # computed once
    assert_greedy_equals_generate(model, words, prompts, 24)


@pytest.mark.parametrize("begin, length", [(34, 27), (52, 9)])
@pytest.mark.parametrize("kind", ["gemma3", "gemma2"])
def test_a_batch_may_fill_the_sliding_window(kind, begin, length, words):
    """Padding takes places of the cache, but none of the window; nor does it with replays."""
    model, rng = random_model(kind), random.Random(0)
    shared = [rng.randrange(2, 97) for _ in range(begin)]
    prompts = [shared + [7], shared + [8, 9, 7]]
    common = dict(max_new_tokens=length, temperature=0, ends=set())
    found = tokenrl.sample(model, words, prompts, 2, **common)
    alone = [tokenrl.sample(model, words, [prompt], 2, **common)[0] for prompt in prompts]
    assert found == alone
    *_, together = tokenrl.sample(model, words, prompts, 1, with_stats=True, **common)
    for prompt, [logps] in zip(prompts, together):
        *_, [[wanted]] = tokenrl.sample(model, words, [prompt], 1, with_stats=True, **common)
        assert logps == pytest.approx(wanted, abs=1e-4)
    whole = found[0][0]
    prefixes = [whole[:n] for n in (0, length // 3, length - 1)]
    groups = tokenrl.sample(model, words, prompts[:1] * 3, 1, prefixes=prefixes, **common)
    assert groups == [[whole[len(prefix) :]] for prefix in prefixes]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_that_end_do_not_disturb_the_others(kind, words):
    model, rng = random_model(kind), random.Random(0)
    prompts = [[rng.randrange(2, 97) for _ in range(rng.randint(1, 6))] for _ in range(24)]
    common = dict(max_new_tokens=16, temperature=0, ends=set(range(2, 20)))
    together = tokenrl.sample(model, words, prompts, 1, rows=24, **common)
    assert together == [
        tokenrl.sample(model, words, [prompt], 1, **common)[0] for prompt in prompts
    ]
    assert len({len(completion) for [completion] in together}) > 3  # rows ended at different times


def eager_graphs(monkeypatch, room: int) -> list:
    """Decode on the CPU as on a card, in fixed places, but with the step itself for a replay."""
    made = []
    monkeypatch.setattr(tokenrl, "GRAPHS", {"cpu": room})

    def called(step, device):
        made.append(device)
        while True:
            yield step()

    monkeypatch.setattr(tokenrl, "replayed", called)
    return made


@pytest.mark.parametrize("room", [1, 2])
@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_sampling_leaves_no_keys_and_values_behind(kind, room, words, monkeypatch):
    def tensors():
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    model, _ = random_model(kind), room > 1 and eager_graphs(monkeypatch, room)
    tokenrl.sample(model, words, [[5, 6]], 2, max_new_tokens=4)  # what is made once may stay
    gc.collect()
    gc.disable()  # a process meets the collector only now and then: a cycle would keep gigabytes
    try:
        before = tensors()
        tokenrl.sample(model, words, [[5, 6]], 2, max_new_tokens=4)
        assert tensors() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("room", [2, 5, 64])
def test_decoding_in_fixed_places_gives_the_same(model, words, room, monkeypatch):
    prompts, prefixes = [[5, 6, 9], [7], [5, 8, 9, 4, 4]], [[], [11, 12], [13]]
    options = dict(prefixes=prefixes, max_new_tokens=14, temperature=0, with_stats=True)
    options["ends"] = set(range(40))
    plain = tokenrl.sample(model, words, prompts, 3, **options)
    lengths = {len(group[0]) for group in plain[0]}
    made = eager_graphs(monkeypatch, room)
    fixed = tokenrl.sample(model, words, prompts, 3, **options)
    assert fixed[0] == plain[0] and len(made) == -(-(max(lengths) - 1) // room)
    for ours, wanted in zip(fixed[1:], plain[1:]):
        for own, right in zip(sum(ours, []), sum(wanted, [])):
            torch.testing.assert_close(torch.tensor(own), torch.tensor(right), atol=1e-4, rtol=1e-4)


def test_rows_that_ended_are_left_alone_until_the_next_graph(words, monkeypatch):
    rows, step = [], tokenrl._step
    eager_graphs(monkeypatch, 4)
    monkeypatch.setattr(tokenrl, "_step", lambda *args: rows.append(len(args[-1])) or step(*args))
    options = dict(max_new_tokens=12, temperature=2.0, ends=set(range(25)))
    [group] = tokenrl.sample(random_model("qwen2"), words, [[5]], 20, **options)
    lengths = [len(completion) for completion in group]
    assert len(set(lengths)) > 3 and max(lengths) > 5
    for completion in group:
        assert not options["ends"] & set(completion[:-1])
        assert completion[-1] in options["ends"] or len(completion) == 12
    alive = [
        sum(length > start for length in lengths) for start in (1, 5, 9) if start < max(lengths)
    ]
    steps = [min(4, max(lengths) - 1 - 4 * i) for i in range(len(alive))]
    assert rows == [1] + [n for n, count in zip(alive, steps) for _ in range(count)]


def test_what_a_finished_row_draws_does_not_matter(words, monkeypatch):
    eager_graphs(monkeypatch, 4)
    plain, calls = tokenrl.draw, []

    def draw(logits, *rest):
        tokens, *stats = plain(logits, *rest)
        calls.append(len(tokens))
        if len(calls) > 1 and len(tokens) == 6:  # until the first row leaves
            tokens[0] = -1 if len(calls) > 2 else 30
        return tokens, *stats

    monkeypatch.setattr(tokenrl, "draw", draw)
    options = dict(max_new_tokens=7, ends={30})
    [group] = tokenrl.sample(random_model("qwen2"), words, [[5]], 6, **options)
    assert group[0][1:] == [30] and max(map(len, group)) == 7 and calls[:6] == [6] * 5 + [5]
    assert all(token >= 0 for completion in group for token in completion)


class Graph:
    """What `replayed` sees of torch.cuda.CUDAGraph, with or without a fault."""

    def __init__(self, fault=""):
        self.fault, self.begun, self.replays = fault, False, 0

    def capture_begin(self, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.begun = True

    def capture_end(self):
        if self.fault:
            raise RuntimeError(self.fault)

    def replay(self):
        self.replays += 1


@pytest.mark.parametrize("fault", ["", "operation not permitted", "CUDA out of memory."])
def test_a_step_that_cannot_be_captured_is_called(fault, monkeypatch):
    graph, calls = Graph(fault), []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = dict(CUDAGraph=lambda: graph, current_stream=lambda device: None)
    fakes |= dict(Stream=lambda device: stream, stream=lambda stream: contextlib.nullcontext())
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(tokenrl, "GRAPHS", {"cuda": 128})
    monkeypatch.setattr(tokenrl, "STREAMS", {})

    def step():
        calls.append("step")
        return len(calls)

    results = tokenrl.replayed(step, "cuda:1")
    assert next(results) == 1 and not graph.begun  # a single token needs no graph
    if "memory" in fault:
        with pytest.raises(RuntimeError, match="memory"):
            next(results)
        return
    assert [next(results) for _ in range(3)] == ([3, 4, 5] if fault else [2, 2, 2])
    assert graph.begun and graph.replays == (0 if fault else 3)
    assert tokenrl.GRAPHS == ({} if fault else {"cuda": 128})  # not tried again
    assert tokenrl.STREAMS == {"cuda:1": stream}


def test_sampling_follows_softmax_and_ignores_the_checkpoints_own_settings(words):
    model = random_model("qwen2")
    own = dict(top_k=2, top_p=0.5, repetition_penalty=5.0, temperature=0.1, do_sample=True)
    model.generation_config.update(**own)
    prompt, temperature, count = [5, 6, 7], 1.7, 20_000
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    wanted = (logits / temperature).softmax(-1)
    options = dict(max_new_tokens=1, temperature=temperature, rows=count)
    [group] = tokenrl.sample(model, words, [prompt], count, **options)
    counts = Counter(completion[0] for completion in group)
    found = torch.tensor([counts[i] / count for i in range(97)])
    assert (found - wanted).abs().sum() / 2 < 0.03  # total variation; 97 cells, 20,000 draws
    assert len([i for i in range(97) if counts[i]]) > 20


def test_second_token_is_sampled_given_the_first_despite_padding_and_dropped_rows(words):
    model = random_model("llama")
    prompts = [[5, 6, 7, 8, 9], [11]]
    options = dict(max_new_tokens=2, rows=16000, temperature=0.5)
    groups = tokenrl.sample(model, words, prompts, 8000, **options)
    for prompt, group in zip(prompts, groups):
        first, number = Counter(c[0] for c in group if c[0] != 1).most_common(1)[0]
        logits = model(input_ids=torch.tensor([prompt + [first]])).logits[0, -1]
        wanted = (logits / 0.5).softmax(-1)
        counts = Counter(c[1] for c in group if c[0] == first)
        found = torch.tensor([counts[i] / number for i in range(97)])
        noise = (2 * wanted * (1 - wanted) / (math.pi * number)).sqrt().sum()  # by chance alone
        assert number > 300 and (found - wanted).abs().sum() < 1.5 * noise


def test_draw_follows_softmax_over_a_large_vocabulary():
    """Frequencies against the exact softmax: of each of the likely tokens, of each thousandth of
    the vocabulary (the tail too), and of what never can be drawn."""
    size, count, temperature = 5000, 16_000, 0.8
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0))
    logits[::7] = -math.inf
    logits[1:40:2] += 6  # some tokens far above the rest, side by side
    logits[3000:4000] -= 100  # a thousand of almost no probability
    logits[-1] = 6.0  # the last one of all
    exact = (logits.double() / temperature).softmax(-1)
    generator = torch.Generator().manual_seed(1)
    parts = [tokenrl.draw(logits.repeat(1000, 1), temperature, generator) for _ in range(16)]
    drawn, entropies, logps = (torch.cat(column) for column in zip(*parts))
    found = torch.bincount(drawn, minlength=size).double() / count
    assert found[exact < 1e-30].sum() == 0 and found[::7].sum() == 0
    likely = exact > 1e-3
    assert likely.sum() > 10 and exact[-1] > 1e-3
    for have, want in [
        *zip(found[likely], exact[likely]),
        *zip(found.split(1000), exact.split(1000)),
        *zip(found.split(128), exact.split(128)),
    ]:
        have, want = have.sum().item(), want.sum().item()
        assert abs(have - want) < 4.5 * math.sqrt(want * (1 - want) / count) + 1e-9
    torch.testing.assert_close(logps.double(), exact[drawn].log(), atol=1e-4, rtol=1e-5)
    entropy = -(exact * exact.clamp(min=1e-300).log()).sum()
    torch.testing.assert_close(entropies.double(), entropy.expand(count), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [2, 127, 128, 129, 5000])
def test_draw_at_the_edges(size):
    generator = torch.Generator().manual_seed(0)
    one = torch.full((64, size), -math.inf)
    one[range(64), [i % size for i in range(64)]] = torch.arange(64.0) * 50 - 1500
    for temperature in (0, 0.01, 1, 100):  # only one token is possible
        tokens, entropies, logps = tokenrl.draw(one.clone(), temperature, generator)
        assert tokens.tolist() == [i % size for i in range(64)]
        assert entropies.abs().max() < 1e-3 and logps.abs().max() < 1e-3
    flat = torch.full((2000, size), 1e4)
    tokens, entropies, logps = tokenrl.draw(flat.clone(), 1.0, generator)
    assert 0 <= tokens.min() and tokens.max() < size and tokens.double().std() > 0.2 * size
    torch.testing.assert_close(entropies, torch.full((2000,), math.log(size)), atol=2e-3, rtol=0)
    torch.testing.assert_close(logps, -entropies, atol=2e-3, rtol=0)
    ties = tokenrl.draw(flat.clone(), 0, generator)[0]
    assert len(set(ties.tolist())) == 1


def test_draw_says_where_logits_are_no_numbers():
    for bad in (math.nan, math.inf):
        logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
        logits[1, 200] = bad
        for temperature in (0, 1.0):
            generator = torch.Generator().manual_seed(0)
            tokens, *_ = tokenrl.draw(logits.clone(), temperature, generator)
            assert tokens[1] == -1 and tokens[0] >= 0 and tokens[2] >= 0


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sampling_from_logits_that_are_no_numbers_ends_in_one_sentence(words, temperature, bad):
    model = random_model("qwen2")
    with torch.no_grad():
        model.model.norm.weight[3] = bad
    with pytest.raises(tokenrl.UserError, match="not finite"):
        tokenrl.sample(model, words, [[5, 6]], 3, max_new_tokens=4, temperature=temperature)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_each_token_comes_with_entropy_and_log_prob_as_it_was_drawn(model, words, temperature):
    prompts, prefixes = [[5, 6], [7], [5, 8, 9]], [[], [11, 12], [13]]
    options = dict(prefixes=prefixes, max_new_tokens=9, temperature=temperature, rows=7)
    options |= dict(ends={1, 2, 3})
    completions, entropies, logprobs = tokenrl.sample(
        model, words, prompts, 4, with_stats=True, **options
    )
    assert completions == tokenrl.sample(model, words, prompts, 4, **options)
    assert max(len(c) for group in completions for c in group) > 6
    for prompt, prefix, *groups in zip(prompts, prefixes, completions, entropies, logprobs):
        for completion, entropy, logprob in zip(*groups):
            before = prompt + prefix
            logits = model(torch.tensor([before + completion])).logits[0, len(before) - 1 : -1]
            scores = (logits / (temperature or 1.0)).log_softmax(-1)
            wanted = scores[range(len(completion)), completion]
            torch.testing.assert_close(torch.tensor(logprob), wanted, atol=1e-4, rtol=1e-4)
            wanted = -(scores.exp() * scores).sum(-1)
            torch.testing.assert_close(torch.tensor(entropy), wanted, atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_samples(words):
    def sampled(seed):
        options = dict(max_new_tokens=9, seed=seed, with_stats=True)
        return tokenrl.sample(random_model("qwen2"), words, [[5, 6], [7]], 4, **options)

    assert sampled(3) == sampled(3) and sampled(3)[0] != sampled(4)[0]


def test_every_end_token_stops_and_is_kept(words):
    model = random_model("qwen2")
    model.generation_config.eos_token_id = [30, 31]
    model.config.eos_token_id = 32
    assert tokenrl.end_tokens(model, words) == {1, 30, 31, 32}
    ends, options = set(range(20, 60)), dict(max_new_tokens=12, temperature=3.0)
    for group in tokenrl.sample(model, words, [[5], [6, 7]], 40, ends=ends, **options):
        assert any(c[-1] in ends for c in group)
        for completion in group:
            assert not ends & set(completion[:-1])
            assert completion[-1] in ends or len(completion) == 12


def test_end_tokens_of_a_config_that_names_none():
    vision = transformers.Gemma3Config(text_config={"eos_token_id": 7})
    assert tokenrl.end_tokens(SimpleNamespace(config=vision, generation_config=None)) == {7}


def test_no_more_rows_at_a_time_than_asked_for(words, monkeypatch):
    rows, plain = [], tokenrl.draw
    monkeypatch.setattr(
        tokenrl, "draw", lambda logits, *rest: rows.append(len(logits)) or plain(logits, *rest)
    )
    options = dict(max_new_tokens=6, ends=set(), rows=3)
    groups = tokenrl.sample(random_model("qwen2"), words, [[5, 6], [7]], 8, **options)
    assert rows == [3] * 30 + [1] * 6 and [len(group) for group in groups] == [8, 8]
    assert len({tuple(completion) for completion in groups[0]}) > 3  # each part draws anew


@pytest.mark.parametrize("length", [2, 18])
def test_stop_text_ends_a_completion(words, length):
    model, options = random_model("qwen2"), dict(max_new_tokens=30, temperature=0, ends=set())
    [free] = tokenrl.sample(model, words, [[5, 6]], 1, **options)
    stop = " ".join(map(str, free[0][6 : 6 + length]))
    [stopped] = tokenrl.sample(model, words, [[5, 6]], 1, stop=stop, **options)
    text = words.decode(free[0])
    assert words.decode(stopped[0]).rstrip() == text[: text.index(stop) + len(stop)].rstrip()


def test_the_stop_text_finishes_a_completion_and_is_not_scored(words):
    pieces = {6: " 2", 7: "\nQuestion:", 8: " 9"}
    words.decode = lambda ids, **_: "".join(pieces[i] for i in ids)
    policy, problem = (
        tokenrl.Policy(random_model("qwen2"), words, "plain", stop="\nQuestion:"),
        tokenrl.Problem("", "2"),
    )
    assert [policy.reward(problem, c) for c in ([6, 7], [6, 7, 8], [6])] == [1.0, 1.0, 0.0]


# ---- replays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["€€", " END"])
def test_a_stop_text_is_seen_a_byte_at_a_time(words, monkeypatch, stop):
    """A token for each byte; decoding strips a first space, as sentencepiece does."""
    pieces = dict(enumerate(stop.encode(), 2))

    def decode(ids, **_):
        text = bytes(pieces.get(i, 120) for i in ids).decode(errors="replace")
        return text.removeprefix(" ")

    words.decode, script = decode, iter([20, 21, *pieces, 22, 23, 24])

    def drawn(logits, *_):
        row = torch.zeros(len(logits))
        return row.long() + next(script), row, row

    monkeypatch.setattr(tokenrl, "draw", drawn)
    [[found]] = tokenrl.sample(random_model("qwen2"), words, [[5]], 1, max_new_tokens=10, stop=stop)
    assert found == [20, 21, *pieces]


def test_a_stop_text_that_a_replay_begins_with_is_seen(words):
    """The prefix ends in "\\n", and the first new tokens complete "\\nQuestion:"."""
    model, starts = random_model("qwen2"), [[5, i] for i in range(2, 97)]
    options = dict(max_new_tokens=30, temperature=0, ends=set())
    groups = tokenrl.sample(model, words, starts, 1, **options)
    at, free, start = next(
        (i, free, start)
        for start, [free] in zip(starts, groups)
        for i in range(3, 20)
        if not {*free[i : i + 3]} & {*free[:i]} and len({*free[i : i + 3]}) == 3
    )
    pieces = {free[at]: "\n", free[at + 1]: "Quest", free[at + 2]: "ion:"}
    words.decode = lambda ids, **_: "".join(pieces.get(i, f"{i} ") for i in ids)
    prefixes = [free[: at + 1], free[: at + 2], []]
    policy = tokenrl.Policy(model, words, "plain", stop="\nQuestion:", ends=set())
    policy.score = lambda text, answer: 1.0
    policy.prompt_ids = lambda question: start
    settings = settings_of(group_size=2, max_new_tokens=30, temperature=0.0)
    rollouts = tokenrl.roll_out(policy, [PROBLEM] * 3, settings, 0, prefixes)
    wanted = [free[len(prefix) : at + 3] for prefix in prefixes]
    assert [rollout.completions for rollout in rollouts] == [[c, c] for c in wanted]
    assert [rollout.rewards for rollout in rollouts] == [[1.0, 1.0]] * 3


def replayed(groups, turns, stop="", max_new_tokens=9):
    policy = tokenrl.Policy(None, Words(), "chat", stop=stop)
    settings = settings_of(max_new_tokens=max_new_tokens)
    return tokenrl.replay_points(policy, groups, turns, settings, random.Random(0))


def test_replays_start_by_turns_in_successes_and_failures():
    group = tokenrl.Rollout(PROBLEM, [1], [[5, 5, 5, 5], [6, 6, 6, 6]], [1.0, 0.0])
    for turns in (range(0, 4), range(1, 4, 2)):  # one process; the second of two
        problems, prefixes = replayed([group], turns)
        assert [prefix[0] for prefix in prefixes] == [(5, 6)[turn % 2] for turn in turns]
        assert problems == [PROBLEM] * len(turns)


def test_replays_do_not_start_within_the_stop_text():
    group = tokenrl.Rollout(PROBLEM, [1], [[5, 6, 7, 8, 9], [4, 4]], [1.0, 0.0])
    _, prefixes = replayed([group], range(40), stop="7 8 9 ")
    assert {tuple(prefix) for prefix in prefixes} == {(5,), (5, 6)}


def test_replays_start_in_groups_with_signal_and_in_no_cut_off_completion():
    groups = [
        tokenrl.Rollout(PROBLEM, [1], [[7] * 4, [8] * 4], [0.0, 0.0]),
        tokenrl.Rollout(PROBLEM, [1], [[2] * 4, [3] * 4], [1.0, 1.0]),
        tokenrl.Rollout(PROBLEM, [1], [[9] * 9, [5] * 4], [1.0, 0.0]),
    ]
    _, prefixes = replayed(groups, range(40))
    assert {prefix[0] for prefix in prefixes} == {5} and len(prefixes) == 40
    assert replayed(groups[:2], range(40)) == ([], [])


def test_replays_leave_two_tokens_to_go():
    group = tokenrl.Rollout(PROBLEM, [1], [[5] * 3, [6] * 6], [1.0, 0.0])
    _, prefixes = replayed([group], range(80))
    lengths = {first: {len(p) for p in prefixes if p[0] == first} for first in (5, 6)}
    assert lengths == {5: {1}, 6: {1, 2, 3, 4}}


def test_the_best_of_a_group_is_its_success():
    group = tokenrl.Rollout(PROBLEM, [1], [[5] * 4, [6] * 4], [0.6, 0.2])
    _, prefixes = replayed([group], range(8))
    assert [prefix[0] for prefix in prefixes] == [5, 6] * 4


def test_a_replay_is_scored_with_what_it_starts_from():
    policy = tokenrl.Policy(
        random_model("qwen2"),
        Words(),
        "plain",
        score=lambda text, answer: float(text.startswith("7 7 7 ")),
    )
    policy.prompt_ids, policy.finished = lambda question: [5, 6], lambda completion: True
    [rollout] = tokenrl.roll_out(policy, [PROBLEM], settings_of(), 0, [[7] * 3])
    assert rollout.rewards == [1.0] * 8 and not rollout.has_signal


def test_a_replay_has_no_more_room_than_the_completion_it_ends():
    """Every completion would be right, but what does not end within max_new_tokens, prefix
    included, earns nothing."""
    policy = tokenrl.Policy(random_model("qwen2"), Words(), "{question}")
    policy.score, problem = (lambda text, answer: 1.0), tokenrl.Problem("5 6", "")
    settings = settings_of(max_new_tokens=24, temperature=9.0, batch_rows=192, group_size=64)
    prefixes = [[], [7] * 9, [7] * 20]
    rollouts = tokenrl.roll_out(policy, [problem] * 3, settings, 0, prefixes)
    for prefix, rollout in zip(prefixes, rollouts):
        assert rollout.prompt == [5, 6, *prefix]
        assert max(map(len, rollout.completions)) == 24 - len(prefix)
        assert rollout.rewards == [completion[-1] == 1 for completion in rollout.completions]
        assert rollout.has_signal
        shapes = [
            [list(map(len, rows)) for rows in (part, rollout.completions)]
            for part in (rollout.entropies, rollout.logprobs)
        ]
        assert all(found == wanted for found, wanted in shapes)
    policy.model.config.max_position_embeddings = 26  # the prompt and 24 tokens, replays alike
    assert len(tokenrl.roll_out(policy, [problem] * 3, settings, 0, prefixes)) == 3


# ---- the training loop --------------------------------------------------------------------------

PROBLEMS = [tokenrl.Problem(f"{i} 9", "1") for i in range(2, 14)]


def tiny_policy(seed=1):
    """About half of its completions end by themselves; those of odd length are right."""
    model = lora(random_model("qwen2"), seed)
    tokenrl.base_of(model).generation_config.eos_token_id = list(range(48))
    right = lambda text, answer: float(len(text.split()) % 2)  # noqa: E731
    return tokenrl.Policy(model, Words(), "{question}", score=right)


def loop_settings(**changes):
    fit = dict(method="s-grpo", steps=4, lr=0.01, replay=3, group_size=8, save_every=2)
    return settings_of(**fit | changes)


def run_training(run, policy=None, held_out=(), stop=(), **changes):
    """Rows without clocks, and the groups of each step."""
    run.mkdir(exist_ok=True)
    policy, settings = policy or tiny_policy(), loop_settings(**changes)
    steps = list(tokenrl.train(policy, PROBLEMS, list(held_out), settings, run, list(stop)))
    return exact(row for row, _ in steps), steps


@pytest.fixture
def watched(monkeypatch):
    """What train() asks of sample() and hands to update()."""
    seen, plain, step = (
        SimpleNamespace(asked=[], drawn=[], updates=[]),
        tokenrl.sample,
        tokenrl.update,
    )

    def sample(*args, **options):
        seen.asked.append((options["temperature"], options["seed"]))
        seen.drawn.append(plain(*args, **options))
        return seen.drawn[-1]

    def update(policy, credited, groups, optimizer, settings):
        seen.updates.append((credited, groups, optimizer.param_groups[0]["lr"]))
        return step(policy, credited, groups, optimizer, settings)

    monkeypatch.setattr(tokenrl, "sample", sample)
    monkeypatch.setattr(tokenrl, "update", update)
    return seen


def test_a_step_draws_as_asked_and_trains_its_replays(tmp_path, watched):
    rows, steps = run_training(tmp_path, temperature=0.7, steps=2)
    assert {temperature for temperature, _ in watched.asked} == {0.7}
    assert len({seed for _, seed in watched.asked}) == 4  # two steps, and their replays
    assert [groups for _, groups, _ in watched.updates] == [2 + 3] * 2
    assert [lr for *_, lr in watched.updates] == [row["lr"] for row in rows]
    first = list(watched.asked)
    asked = [rollout.problem for _, rollouts in steps for rollout in rollouts]
    assert len(set(asked)) == 4  # other problems in the second step
    for seed in (0, 1):
        watched.asked.clear()
        run_training(tmp_path / str(seed), temperature=0.7, steps=2, seed=seed)
        assert (watched.asked == first) == (seed == 0)


def mean(values):
    return sum(values) / len(values)


def test_a_row_of_metrics_is_of_the_prompts_groups_alone_but_for_signal_and_tokens(
    tmp_path, watched
):
    policy = tiny_policy()
    rows, steps = run_training(tmp_path, policy, steps=3, temperature=0.3)
    replay_rewards = []
    for i, (row, rollouts) in enumerate(steps):
        completions = [c for rollout in rollouts for c in rollout.completions]
        rewards = [reward for rollout in rollouts for reward in rollout.rewards]
        assert row["step"] == i + 1 and len(rollouts) == 2 and len(completions) == 16
        assert row["reward"] == row["accuracy"] == pytest.approx(mean(rewards))
        unique = [len({tuple(c) for c in r.completions}) / 8 for r in rollouts]
        assert row["distinct"] == pytest.approx(mean(unique))
        entropies = [x for rollout in rollouts for one in rollout.entropies for x in one]
        assert row["entropy"] == pytest.approx(mean(entropies)) and row["entropy"] > 0
        assert row["length"] == pytest.approx(mean([len(c) for c in completions]))
        cut = [c[-1] >= 48 for c in completions]
        assert row["truncated"] == pytest.approx(mean(cut))
        credited, groups, _ = watched.updates[i]
        assert row["signal"] == pytest.approx(len(credited) / groups)
        drawn = [c for part in watched.drawn[2 * i : 2 * i + 2] for group in part[0] for c in group]
        assert len(drawn) == 40 and row["tokens_generated"] == sum(map(len, drawn))
        assert row["tokens_trained"] > 0 and row["tokens_packed"] > 0 and not row["skipped"]
        replay_rewards += [x for r, *_ in credited if len(r.prompt) > 2 for x in r.rewards]
    assert rows_of(tmp_path / "metrics.jsonl") == [row for row, _ in steps]
    assert len({row["distinct"] for row in rows}) > 1 and max(row["distinct"] for row in rows) <= 1
    assert abs(mean(replay_rewards) - mean([row["reward"] for row in rows])) > 0.01  # else no test


def test_processes_take_other_problems_and_draw_other_samples(tmp_path, watched, monkeypatch):
    """The loop as each of two processes would go through it."""
    asked, seeds = [], []
    for rank in range(2):
        state = SimpleNamespace(process_index=rank, num_processes=2)
        monkeypatch.setattr(tokenrl, "processes", lambda state=state: state)
        watched.asked.clear()
        _, steps = run_training(tmp_path / str(rank), steps=1, prompts_per_step=4, replay=2)
        asked.append([rollout.problem for rollout in steps[0][1]])
        seeds.append({seed for _, seed in watched.asked})
    monkeypatch.undo()
    wanted = tokenrl.step_problems(PROBLEMS, 0, 4, 0)
    assert sorted(sum(asked, []), key=str) == sorted(wanted, key=str) and len(set(wanted)) == 4
    assert not seeds[0] & seeds[1]


def test_learning_rate_warms_up_and_decays():
    rates = [tokenrl.learning_rate(step, settings_of(steps=20, lr=1.0)) for step in range(20)]
    assert rates[:2] == [0.5, 1.0] and rates[-1] == pytest.approx(0.1)
    assert rates[1:] == sorted(rates[1:], reverse=True)


@pytest.mark.parametrize("size, count", [(10, 3), (4, 4), (3, 8)])
def test_problems_come_epoch_after_epoch(size, count):
    problems = [tokenrl.Problem(str(i), "1") for i in range(size)]
    steps = [tokenrl.step_problems(problems, step, count, 7) for step in range(3 * size)]
    assert all(len(step) == count for step in steps)
    flat = sum(steps, [])
    epochs = [flat[i : i + size] for i in range(0, len(flat), size)]
    assert all(len(set(epoch)) == size for epoch in epochs)
    assert size < 4 or len({tuple(p.question for p in epoch) for epoch in epochs}) > 1
    assert steps[2] == tokenrl.step_problems(problems, 2, count, 7)
    assert steps != [tokenrl.step_problems(problems, step, count, 8) for step in range(3 * size)]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    held_out = PROBLEMS[:3]
    common = dict(validate_every=2, target_kl=0.003, patience=9)
    whole, _ = run_training(tmp_path / "whole", held_out=held_out, **common)
    first, _ = run_training(tmp_path / "parts", held_out=held_out, stop=[2], **common)
    assert len(first) == 1
    policy = tiny_policy(seed=9)  # what it starts from is in the folder
    rest, _ = run_training(tmp_path / "parts", policy, held_out, **common)
    assert first + rest == whole and len(whole) == 4 and "validation" in whole[1]
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def assert_same_runs(*runs):
    first, second = (safetensors.torch.load_file(run / "adapter_model.safetensors") for run in runs)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    states = [torch.load(run / "state.pt", weights_only=True) for run in runs]
    flat = [json.dumps(state, default=lambda tensor: tensor.tolist()) for state in states]
    assert flat[0] == flat[1]
    rows = [exact(rows_of(run / "metrics.jsonl")) for run in runs]
    assert rows[0] == rows[1]


def test_a_run_that_is_killed_between_any_two_writes_goes_on_exactly(tmp_path, monkeypatch):
    common = dict(steps=2, save_every=1, replay=0)
    replace, left = os.replace, [10**9]

    class Killed(BaseException):
        pass

    def count_down(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", count_down)
    run_training(tmp_path / "whole", **common)
    writes = 10**9 - left[0]
    assert writes >= 9  # two files of the adapter and the state, three times
    for at in range(writes):
        run, left[0] = tmp_path / str(at), at
        with pytest.raises(Killed):
            run_training(run, **common)
        left[0] = 10**9
        run_training(run, tiny_policy(), **common)
        assert_same_runs(tmp_path / "whole", run)


def test_validation_keeps_the_best_adapter_and_ends_without_gain(tmp_path, monkeypatch):
    """Validations before training and after each step; the best is that after step 2."""
    scores, kept, plain = iter([0.2, 0.1, 0.6, 0.5, 0.4, 0.9]), {}, tokenrl.save_run
    monkeypatch.setattr(tokenrl, "validate", lambda *_: next(scores))

    def save_run(run, model, optimizer, state, keep):
        plain(run, model, optimizer, state, keep)
        kept[state["step"]] = trained_weights(model)

    monkeypatch.setattr(tokenrl, "save_run", save_run)
    common = dict(held_out=PROBLEMS[:2], steps=9, patience=2, validate_every=1, replay=0)
    rows, _ = run_training(tmp_path, **common)
    assert [row["validation"] for row in rows] == [0.1, 0.6, 0.5, 0.4]  # two without gain: the end
    again = tokenrl.load_adapter(tiny(), tmp_path, "default", "tiny", trainable=True)
    assert torch.equal(trained_weights(again), kept[2])
    assert not torch.equal(trained_weights(again), kept[4])
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (state["step"], state["best_step"], state["best"]) == (4, 2, 0.6)


def test_problems_that_validate_are_asked_greedily(monkeypatch):
    policy, seen, plain = tiny_policy(), [], tokenrl.sample
    monkeypatch.setattr(
        tokenrl, "sample", lambda *a, **k: seen.append(k["temperature"]) or plain(*a, **k)
    )
    score = tokenrl.validate(policy, PROBLEMS, settings_of())
    records = tokenrl.evaluate(policy, PROBLEMS, settings_of())
    assert set(seen) == {0.0} and score == mean([record["correct"] for record in records])


# ---- runs that come to nothing ------------------------------------------------------------------


def adapter_of(run):
    return (run / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("held_out", [0, 3])
@pytest.mark.parametrize("save_every", [1, 100])
def test_whatever_a_bad_learning_rate_does_the_good_adapter_stays(tmp_path, save_every, held_out):
    policy = tiny_policy()
    start = trained_weights(policy.model)
    common = dict(lr=1e20, steps=40, target_kl=0.003, held_out=PROBLEMS[:held_out], replay=0)
    common |= dict(validate_every=1 if held_out else 0, save_every=save_every, patience=50)
    with pytest.raises(tokenrl.UserError, match="lower --lr") as error:
        run_training(tmp_path, policy, **common)
    assert str(tmp_path) in str(error.value) and "step" in str(error.value)
    again = tokenrl.load_adapter(tiny(), tmp_path, "default", "tiny", trainable=True)
    assert torch.equal(trained_weights(again), start)


def test_without_a_limit_a_bad_learning_rate_ends_the_run_before_it_is_saved(tmp_path):
    policy = tiny_policy()
    start = trained_weights(policy.model)
    with pytest.raises(tokenrl.UserError, match="lower --lr"):
        run_training(tmp_path, policy, lr=1e4, steps=40, target_kl=0.0, replay=0, save_every=10)
    again = tokenrl.load_adapter(tiny(), tmp_path, "default", "tiny", trainable=True)
    assert torch.equal(trained_weights(again), start)


def new_state(tmp_path, **changes):
    model = lora(random_model("qwen2"))
    return tokenrl.load_state(tmp_path, model, tokenrl.new_optimizer(model)) | changes


def row_of(step, **changes):
    row = dict(
        step=step, reward=0.5, signal=0.5, truncated=0.1, tokens_trained=9, skipped=False, kl=0.001
    )
    return row | changes


BAD = dict(skipped=True)
IDLE = dict(signal=0.0, tokens_trained=0)
LOST = IDLE | dict(reward=0.0, truncated=1.0)


def steps_until_the_end(state, changes, run="runs/x"):
    for number, change in enumerate(changes, 1):
        row = row_of(number, **change)
        tokenrl.judge(state, row, False)
        try:
            tokenrl.check_alive(state, row, Path(run))
        except tokenrl.UserError as error:
            return number, str(error)
    return None, ""


def test_steps_without_signal_do_not_forget_failures(tmp_path):
    steps, said = steps_until_the_end(new_state(tmp_path, best_step=7), [BAD, IDLE, BAD, IDLE, BAD])
    assert steps == 5 and "runs/x" in said and "step 7" in said and "--lr" in said
    good = [BAD, BAD, {}, BAD, BAD, IDLE, {}, BAD]
    assert steps_until_the_end(new_state(tmp_path), good)[0] is None
    resumed = new_state(tmp_path, failures=3)  # saved with the third: the next one ends it again
    assert steps_until_the_end(resumed, [BAD])[0] == 1


def test_a_policy_that_has_collapsed_ends_the_run(tmp_path):
    dead = tokenrl.DEAD_STEPS
    steps, said = steps_until_the_end(new_state(tmp_path, best=0.6), [{}] + [LOST] * 20)
    assert steps == 1 + dead and "runs/x" in said and "100%" in said
    assert steps_until_the_end(new_state(tmp_path), [IDLE | dict(truncated=1.0)] * 20)[0] == dead
    silent = IDLE | dict(reward=0.0)  # no longer right, where it has been
    assert steps_until_the_end(new_state(tmp_path, best=0.6), [silent] * 20)[0] == dead
    assert steps_until_the_end(new_state(tmp_path), [silent] * 20)[0] is None  # hard from the start
    assert steps_until_the_end(new_state(tmp_path), [IDLE | dict(reward=1.0)] * 20)[0] is None
    some = ([LOST] * (dead - 1) + [{}]) * 3
    assert steps_until_the_end(new_state(tmp_path), some)[0] is None
    assert steps_until_the_end(new_state(tmp_path, dead=dead), [LOST])[0] == 1


def test_without_validation_a_policy_that_fell_does_not_replace_a_good_one(tmp_path):
    state, kept = new_state(tmp_path), []
    for number, reward in enumerate([0.4, 0.6, 0.2, 0.9, 0.1, 0.05, 0.3, 0.3], 1):
        saving = number % 2 == 0
        kept.append(tokenrl.judge(state, row_of(number, reward=reward), saving))
    assert kept == [False, True, False, True, False, False, False, True]
    assert state["best_step"] == 8 and state["best"] == pytest.approx(0.55)


def test_without_a_limit_an_adapter_of_a_wild_step_is_not_kept(tmp_path):
    """Its rewards are those from before the step."""
    for kl in (3.0, math.nan, math.inf):
        state = new_state(tmp_path)
        assert tokenrl.judge(state, row_of(1), True)
        assert not tokenrl.judge(state, row_of(2, kl=kl), True)
        assert not tokenrl.judge(state, row_of(3, reward=0.0, kl=0.0), True)
        assert state["best_step"] == 1


def test_validation_decides_what_is_kept(tmp_path):
    state, kept = new_state(tmp_path, best=0.3), []
    for number, score in enumerate([0.3, None, 0.2, 0.5, 0.5, 0.4], 1):
        row = row_of(number) | ({} if score is None else {"validation": score})
        kept.append(tokenrl.judge(state, row, False))
    assert kept == [True, False, False, True, True, False]
    assert (state["best"], state["best_step"], state["stale"]) == (0.5, 5, 2)


def test_what_a_save_is_judged_by(tmp_path):
    state = new_state(tmp_path, best=0.6)  # half of the best is enough
    assert not tokenrl.judge(state, row_of(1, reward=0.29), True)
    assert tokenrl.judge(state, row_of(2, reward=0.31), True)
    state = new_state(tmp_path)  # a validation comes after the step, however wild that was
    assert tokenrl.judge(state, row_of(1, kl=3.0) | {"validation": 0.5}, False)
    for some in (IDLE | dict(truncated=0.8), dict(truncated=1.0)):
        assert steps_until_the_end(new_state(tmp_path), [some] * 20)[0] is None
    rows, _ = run_training(tmp_path, save_every=2)
    means = [(rows[i]["reward"] + rows[i + 1]["reward"]) / 2 for i in (0, 2)]
    best = torch.load(tmp_path / "state.pt", weights_only=True)["best"]
    assert best == pytest.approx(max(means)) != max(row["reward"] for row in rows)


def test_a_stop_without_validation_changes_nothing(tmp_path):
    run_training(tmp_path / "whole", steps=4, save_every=4)
    run_training(tmp_path / "parts", steps=4, save_every=4, stop=[2])
    run_training(tmp_path / "parts", tiny_policy(seed=9), steps=4, save_every=4)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_the_last_step_is_validated(tmp_path):
    rows, _ = run_training(tmp_path, held_out=PROBLEMS[:2], steps=3, validate_every=2)
    assert ["validation" in row for row in rows] == [False, True, True]


def test_rewards_between_0_and_1_are_validated_but_are_no_accuracy(tmp_path):
    policy = tiny_policy()
    policy.score = lambda text, answer: 0.8 * (len(text.split()) % 2)
    options = dict(held_out=PROBLEMS[:6], validate_every=1, steps=2)
    rows, _ = run_training(tmp_path, policy, **options)
    assert max(row["validation"] for row in rows) > 0
    assert {row["accuracy"] for row in rows} == {0} and max(row["reward"] for row in rows) > 0


# ---- evaluation ---------------------------------------------------------------------------------


def test_samples_leave_the_greedy_batches_as_they_are(words, monkeypatch):
    """In bfloat16 the width of a batch decides close calls: greedy accuracy must not depend on how
    many are sampled."""
    policy = tokenrl.Policy(random_model("qwen2"), words, "{question}")
    problems = [tokenrl.Problem(f"{2 + i} {2 + 7 * i % 90}", "1") for i in range(50)]
    settings = settings_of(batch_rows=20, max_new_tokens=8)
    asked, told, plain = [], [], tokenrl._decode

    def decode(model, starts, owners, ended, temperature, generator):
        asked.append(([starts[i] for i in owners], temperature))
        return plain(model, starts, owners, ended, temperature, generator)

    monkeypatch.setattr(tokenrl, "_decode", decode)
    alone = tokenrl.evaluate(policy, problems, settings)
    greedy, asked[:] = list(asked), []
    beside = tokenrl.evaluate(policy, problems, settings, samples=5, tick=told.append)
    assert [call for call in asked if call[1] == 0] == greedy
    assert all(len(starts) <= 20 for starts, _ in asked)
    for key in ("completion", "entropy", "length"):
        assert [record[key] for record in beside] == [record[key] for record in alone]
    assert {record["samples"] for record in beside} == {5} and sum(told) == 50 * (1 + 5)


def test_evaluation_counts_what_each_sample_earned(words, monkeypatch):
    words.encode, temperatures = (lambda text, **_: [5]), []
    policy = tokenrl.Policy(
        random_model("qwen2"),
        words,
        "{question}",
        score=lambda text, answer: 1.0 if text.split()[0] == answer else 0.5,
    )

    def scripted(model, tokenizer, prompts, count, *, temperature, **_):
        temperatures.append(temperature)
        group = [[6, 1]] if count == 1 else [[6, 1], [7, 1], [6]]  # the last is cut off
        stats = [[0.5 * (i + 1) for i in range(len(c))] for c in group]
        return [group for _ in prompts], [stats for _ in prompts], [stats for _ in prompts]

    monkeypatch.setattr(tokenrl, "sample", scripted)
    settings = settings_of(batch_rows=3, max_new_tokens=8, temperature=0.7)
    problems = [tokenrl.Problem(f"q{i}", i) for i in "67"]
    records = tokenrl.evaluate(policy, problems, settings, samples=3)
    keys = ("correct", "samples_correct", "length", "entropy")
    assert [tuple(r[k] for k in keys) for r in records] == [(True, 1, 2, 0.75), (False, 1, 2, 0.75)]
    assert temperatures == [0.0, 0.7]


def test_processes_draw_other_samples_in_an_evaluation(monkeypatch):
    seeds, plain = [], tokenrl.sample

    def sample(*arguments, **options):
        seeds.append(options["seed"])
        return plain(*arguments, **options)

    monkeypatch.setattr(tokenrl, "sample", sample)
    for rank in range(2):
        state = SimpleNamespace(process_index=rank, num_processes=2)
        monkeypatch.setattr(tokenrl, "processes", lambda state=state: state)
        tokenrl.evaluate(tiny_policy(), PROBLEMS, settings_of(), samples=2)
    assert len(seeds) == 4 and not {*seeds[:2]} & {*seeds[2:]}


# ---- other systems -------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["Windows", "macOS"])
def test_nothing_is_needed_that_only_linux_has(cli, quick, monkeypatch, system):
    """Modules, files and functions that a system lacks are hidden: a run trains, saves and goes on."""
    assert cli("train", "svamp", *FAST, "--steps", "1", "--name", "before")[0] == 0  # imports all
    for name in ["fcntl", "pwd", "termios"] + ["resource"] * (system == "Windows"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ["sched_getaffinity", "fork"] + ["getuid", "kill"] * (system == "Windows"):
        monkeypatch.delattr(os, name)
    read = Path.read_text

    def without_proc(path, *arguments, **options):
        if path.parts[:2] == ("/", "proc"):
            raise FileNotFoundError(path)
        return read(path, *arguments, **options)

    def library(name):
        if system == "Windows":
            raise TypeError("there is no library without a name")
        return object()  # without malloc_trim

    monkeypatch.setattr(Path, "read_text", without_proc)
    monkeypatch.setattr(tokenrl.ctypes, "CDLL", library)
    monkeypatch.setattr(sys, "platform", {"Windows": "win32", "macOS": "darwin"}[system])
    code, said = cli("train", "svamp", *FAST, "--steps", "1")
    assert code == 0, said
    [row] = rows_of("runs/svamp-s-grpo/metrics.jsonl")
    assert (row["peak_memory"] == 0) == (system == "Windows")
    assert cli("train", "svamp", *FAST, "--steps", "1", "--resume", "runs/svamp-s-grpo")[0] == 0
    assert cli("eval", "svamp", "--limit", "4", "--adapter", "runs/svamp-s-grpo")[0] == 0
