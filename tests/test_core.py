"""The exact core: credit functions, the packed pass and its gradients, sampling."""

import contextlib
import gc
import math
import random
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, Words, random_completions, random_model

import tokenrl


def random_group(seed):
    rng = random.Random(seed)
    completions = random_completions(rng, rng.randint(2, 9), 7)
    rewards = [rng.choice([0.0, 1.0, rng.random()]) for _ in completions]
    return completions, rewards


# ---- trie and credit, against brute force over prefixes -----------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_trie_holds_each_prefix_once(seed):
    completions, _ = random_group(seed)
    trie = tokenrl.Trie(completions)
    prefixes = {tuple(c[: i + 1]) for c in completions for i in range(len(c))}
    assert len(trie.tokens) == len(prefixes)
    for completion, path in zip(completions, trie.paths):
        assert [trie.tokens[n] for n in path] == completion
        assert [trie.depths[n] for n in path] == list(range(len(completion)))
        assert [trie.parents[n] for n in path] == [-1, *path[:-1]]
    assert all(parent < node for node, parent in enumerate(trie.parents))


def prefix_of(trie, node):
    tokens = []
    while node >= 0:
        tokens.append(trie.tokens[node])
        node = trie.parents[node]
    return tuple(reversed(tokens))


def by_prefix(trie, weights):
    return {prefix_of(trie, node): weight for node, weight in weights.items()}


def assert_same(found, wanted):
    wanted = {key: value for key, value in wanted.items() if abs(value) > 1e-9}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, abs=1e-9)


def brute_advantages(rewards):
    tensor = torch.tensor(rewards, dtype=torch.float64)
    return ((tensor - tensor.mean()) / (tensor.std(unbiased=False) + 1e-4)).tolist()


@pytest.mark.parametrize("seed", range(40))
def test_grpo_weights(seed):
    completions, rewards = random_group(seed)
    trie, wanted = tokenrl.Trie(completions), defaultdict(float)
    for completion, advantage in zip(completions, brute_advantages(rewards)):
        for t in range(len(completion)):
            wanted[tuple(completion[: t + 1])] += advantage / (len(completions) * len(completion))
    assert_same(by_prefix(trie, tokenrl.grpo_weights(trie, rewards)), wanted)


@pytest.mark.parametrize("seed", range(40))
def test_s_grpo_weights(seed):
    completions, rewards = random_group(seed)
    alpha, p = random.Random(seed).choice([(0, 0.5), (2, 0.3), (3, 0.0), (1, 1.0)])
    trie, wanted, rng = tokenrl.Trie(completions), defaultdict(float), random.Random(7)
    for completion, advantage in zip(completions, brute_advantages(rewards)):
        kept = [t for t in range(len(completion)) if t < alpha or rng.random() < p]
        for t in kept:
            wanted[tuple(completion[: t + 1])] += advantage / (len(completions) * len(kept))
    assert_same(
        by_prefix(trie, tokenrl.s_grpo_weights(trie, rewards, alpha, p, random.Random(7))), wanted
    )


def test_s_grpo_keeps_the_share_it_promises():
    completions = [
        [random.Random(i * 1000 + t).randrange(1000) for t in range(104)] for i in range(200)
    ]
    trie, rewards = tokenrl.Trie(completions), [float(i % 2) for i in range(200)]
    chosen = tokenrl.s_grpo_weights(trie, rewards, 4, 0.3, random.Random(0))
    assert all(
        n in chosen for path in trie.paths for n in path[:4] if sum(n in p for p in trie.paths) == 1
    )
    assert sum(trie.depths[n] >= 4 for n in chosen) / (200 * 100) == pytest.approx(0.3, abs=0.02)
    assert tokenrl.s_grpo_weights(trie, rewards, 0, 1.0, random.Random(0)) == tokenrl.grpo_weights(
        trie, rewards
    )


@pytest.mark.parametrize("seed", range(40))
def test_t_spmo_weights(seed):
    completions, rewards = random_group(seed)
    trie, credit = tokenrl.Trie(completions), {}
    mean = (
        lambda prefix: (lambda rs: sum(rs) / len(rs))(  # noqa: E731
            [r for c, r in zip(completions, rewards) if tuple(c[: len(prefix)]) == prefix]
        )
    )
    for prefix in {tuple(c[: i + 1]) for c in completions for i in range(len(c))}:
        credit[prefix] = mean(prefix) - mean(prefix[:-1])
    credit = {prefix: value for prefix, value in credit.items() if abs(value) > 1e-9}
    assert_same(
        by_prefix(trie, tokenrl.t_spmo_weights(trie, rewards)),
        {prefix: value / len(credit) for prefix, value in credit.items()},
    )


def test_equal_rewards_give_no_credit():
    trie = tokenrl.Trie([[2, 3], [2, 4], [5]])
    for rewards in ([0.0] * 3, [1.0] * 3, [0.3] * 3):
        assert tokenrl.grpo_weights(trie, rewards) == {}
        assert tokenrl.t_spmo_weights(trie, rewards) == {}


# ---- the packed pass, against one plain forward per completion ----------------------------------------------------


def plain_logprobs(model, prompt, completion, temperature=1.0):
    logits = (
        model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    )
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def lora(model, seed=1, checkpointing=False):
    """LoRA on all layers' q, v with random, non-zero B, so that gradients reach every matrix."""
    wrapped = tokenrl.add_lora(model, 4, 8, "q_proj,v_proj", 0.5, checkpointing)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return wrapped


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("seed", range(3))
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
    assert packed.dtype == torch.float32
    torch.testing.assert_close(packed, wanted, atol=2e-5, rtol=1e-5)
    found, expected = (
        gradients(model, (weights * packed).sum()),
        gradients(model, (weights * wanted).sum()),
    )
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


def test_packed_logprobs_with_temperature():
    model = random_model("qwen2")
    trie = tokenrl.Trie([[5, 6], [5, 7]])
    logits = model(input_ids=torch.tensor([[3, 4, 5, 7]])).logits[0].float() / 0.7
    wanted = logits.log_softmax(-1)
    found = tokenrl.packed_logprobs(model, [3, 4], trie, [0, 2], temperature=0.7)
    torch.testing.assert_close(
        found, torch.stack([wanted[1, 5], wanted[2, 7]]), atol=2e-5, rtol=1e-5
    )


def test_pack_holds_only_what_is_needed():
    trie = tokenrl.Trie([[2, 3, 4, 5], [2, 6, 7]])
    ids, positions, allowed, _ = tokenrl.pack(
        [9, 9], trie, [1, 4]
    )  # the branch: tokens 3 and 6 after 2
    assert ids.tolist() == [9, 9, 2] and positions.tolist() == [0, 1, 2]
    assert allowed.tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_a_trained_output_embedding_gets_its_gradient_too():
    model, (completions, _) = random_model("qwen2"), random_group(4)
    trie = tokenrl.Trie(completions)
    nodes = list(range(len(trie.tokens)))
    tokenrl.packed_logprobs(model, [5, 6], trie, nodes).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    seen = set()
    for path, completion in zip(
        trie.paths, completions
    ):  # each node once, one plain pass per completion
        logits = model(torch.tensor([[5, 6] + completion])).logits[0, 1:-1].log_softmax(-1)
        new = [i for i, node in enumerate(path) if node not in seen]
        logits[new, [completion[i] for i in new]].sum().backward()
        seen.update(path)
    for name, p in model.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, atol=1e-4, rtol=1e-3)


def test_an_empty_prompt_is_refused():
    with pytest.raises(tokenrl.UserError, match="prompt is empty"):
        tokenrl.packed_logprobs(random_model("qwen2"), [], tokenrl.Trie([[5, 6]]), [0, 1])


def test_sliding_window_is_refused():
    model = random_model("gemma3")
    trie = tokenrl.Trie([list(range(2, 70))])
    with pytest.raises(tokenrl.UserError, match="sliding window of 64"):
        tokenrl.packed_logprobs(model, [5], trie, [66])


def test_check_packing_accepts_exact_models_and_refuses_others(model, monkeypatch):
    class Tokens(list):
        pass

    tokenizer = Tokens(range(97))
    tokenrl.check_packing(model, tokenizer)
    layer = model.get_decoder().layers[0]
    forward = layer.forward  # a layer that looks at its neighbour whatever the mask says
    monkeypatch.setattr(
        layer, "forward", lambda x, *a, **k: forward(x + x.roll(1, dims=1), *a, **k)
    )
    with pytest.raises(tokenrl.UserError, match="does not fit the packed update"):
        tokenrl.check_packing(model, tokenizer)


def test_check_packing_refuses_what_it_cannot_run():
    torch.manual_seed(0)
    recurrent = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=97,
            hidden_size=32,
            state_size=4,
            num_hidden_layers=2,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    with pytest.raises(tokenrl.UserError, match="mamba.* does not fit the packed update"):
        tokenrl.check_packing(recurrent.eval(), list(range(97)))


def test_layers_that_share_keys_and_values(words):
    torch.manual_seed(0)
    model = transformers.Gemma3nForCausalLM(
        transformers.Gemma3nTextConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=64,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=97,
            layer_types=["sliding_attention", "full_attention"] * 2,
            laurel_rank=4,
            altup_num_inputs=2,
            activation_sparsity_pattern=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    tokenrl.check_packing(model, list(range(97)))
    prompts = [[5, 6, 7, 8], [5, 6, 9]]
    for prompt, [completion] in zip(
        prompts, tokenrl.sample(model, words, prompts, max_new_tokens=6, temperature=0)
    ):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[
            0
        ].tolist()
        assert prompt + completion == whole


def test_a_bfloat16_model_is_sampled_and_trained_with_float32_logits(words):
    model, trie = random_model("qwen2").bfloat16(), tokenrl.Trie([[5, 6, 7], [5, 8]])
    assert tokenrl.packed_logprobs(model, [3, 4], trie, [0, 1, 2, 3]).dtype == torch.float32
    assert tokenrl.packing_gap(model, range(97)) < 0.5
    assert len(tokenrl.sample(model, words, [[3, 4]], 4, max_new_tokens=5)[0]) == 4


def test_a_group_without_signal_asks_for_no_logprobs():
    assert tokenrl.packed_logprobs(
        random_model("qwen2"), [3, 4], tokenrl.Trie([[5]]), []
    ).shape == (0,)


def test_prompt_and_completion_must_fit_the_context(words):
    with pytest.raises(
        tokenrl.UserError, match="need 515 tokens, but this model's context holds 512"
    ):
        tokenrl.sample(random_model("qwen2"), words, [[5] * 500], max_new_tokens=15)


def settings_of(**changes):
    return SimpleNamespace(
        **{
            "method": "grpo",
            "alpha": 2,
            "p": 0.5,
            "temperature": 1.0,
            "beta": 0.0,
            "l2": 0.0,
            "on_prob": False,
            "max_grad_norm": 1e9,
            "max_pack_tokens": 1024,
        }
        | changes
    )


def step_gradient(model, rollouts, settings, rng):
    """The gradient that update() hands to the optimizer, and what it reports."""
    seen = []
    optimizer = tokenrl.new_optimizer(model)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.requires_grad])
        )
    )
    return tokenrl.update(
        tokenrl.Policy(model, None, "plain"), rollouts, optimizer, 0.0, settings, rng
    ), seen[0]


PROBLEM = tokenrl.Problem("q", "1")


def random_step():
    """Groups whose prompts begin alike, one of them a replay from inside another, one without signal, one apart."""
    (completions, rewards), (others, other_rewards) = random_group(3), random_group(8)
    return [
        tokenrl.Rollout(PROBLEM, [4, 5, 6], completions, rewards),
        tokenrl.Rollout(PROBLEM, [4, 5, 6, *completions[0][:2]], others, other_rewards),
        tokenrl.Rollout(PROBLEM, [4, 5], completions, [1.0] * len(rewards)),
        tokenrl.Rollout(PROBLEM, [4, 7], others, other_rewards),
        tokenrl.Rollout(PROBLEM, [9], completions, rewards),
    ]


@pytest.mark.parametrize("budget, temperature", [(1024, 1.0), (1024, 0.7), (9, 0.7), (1, 1.0)])
@pytest.mark.parametrize("method", ["grpo", "s-grpo", "t-spmo"])
def test_update_is_the_policy_gradient(method, budget, temperature):
    """One step's gradient, through update(), against the formula written over completions with plain forwards, however
    the step is cut into packs."""
    model, rollouts = lora(random_model("qwen2")), random_step()
    # on_prob is for t-spmo alone, and the command line sets it whatever the method.
    settings = settings_of(
        method=method,
        on_prob=method != "t-spmo",
        l2=0.01,
        max_pack_tokens=budget,
        temperature=temperature,
    )
    report, found = step_gradient(model, rollouts, settings, random.Random(5))

    rng, loss, trained = random.Random(5), 0.0, 0
    for rollout in rollouts:
        if not rollout.has_signal:
            continue
        trie, rewards = tokenrl.Trie(rollout.completions), rollout.rewards
        logps = [plain_logprobs(model, rollout.prompt, c, temperature) for c in rollout.completions]
        if method == "t-spmo":
            weights = tokenrl.t_spmo_weights(trie, rewards)
            by_node = {n: lp for path, row in zip(trie.paths, logps) for n, lp in zip(path, row)}
            loss, trained = (
                loss - sum(w * by_node[n] for n, w in weights.items()),
                trained + len(weights),
            )
            continue
        for row, advantage in zip(logps, brute_advantages(rewards)):
            kept = [t for t in range(len(row)) if method == "grpo" or t < 2 or rng.random() < 0.5]
            loss = loss - advantage * row[kept].mean() / len(logps)
    loss = loss / len(rollouts) + 0.01 * sum(
        p.pow(2).sum() for p in model.parameters() if p.requires_grad
    )
    expected = gradients(model, loss)
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)
    assert method != "t-spmo" or report["tokens_trained"] == trained


@pytest.mark.parametrize("seed", range(10))
def test_split_nodes_covers_all_within_the_budget(seed):
    rng = random.Random(seed)
    trie = tokenrl.Trie(random_completions(rng, 9, 8))
    nodes = rng.sample(range(len(trie.tokens)), len(trie.tokens) // 2)
    parts = list(tokenrl.split_nodes(trie, nodes, 10))
    assert sorted(sum(parts, [])) == sorted(nodes)
    assert all(len(tokenrl.pack([5], trie, part)[0]) <= 11 for part in parts)


def test_t_spmo_on_probability_scales_by_pi():
    model = lora(random_model("qwen2"))
    trie, rewards = tokenrl.Trie([[7], [8]]), [1.0, 0.0]
    weights = tokenrl.t_spmo_weights(trie, rewards)
    assert weights == {0: 0.25, 1: -0.25}
    probs = torch.stack([plain_logprobs(model, [4, 5], [t])[0].exp() for t in (7, 8)])
    loss = tokenrl.pack_loss(
        tokenrl.Policy(model, None, "plain"),
        [4, 5],
        trie,
        weights,
        0.0,
        settings_of(method="t-spmo", on_prob=True),
    )
    torch.testing.assert_close(loss, -(0.25 * probs[0] - 0.25 * probs[1]))


def test_kl_is_zero_at_the_base_and_pulls_back_to_it():
    trie, nothing = tokenrl.Trie([[7, 9], [8]]), {0: 0.0, 1: 0.0, 2: 0.0}
    policy = tokenrl.Policy(
        tokenrl.add_lora(random_model("qwen2"), 4, 8, "q_proj", 0.5), None, "plain"
    )
    assert tokenrl.pack_loss(policy, [4, 5], trie, nothing, 1.0, settings_of()).item() == 0.0
    policy = tokenrl.Policy(lora(random_model("qwen2")), None, "plain")
    loss = tokenrl.pack_loss(policy, [4, 5], trie, nothing, 1.0, settings_of())
    logps = torch.cat([plain_logprobs(policy.model, [4, 5], c) for c in ([7, 9], [8])])
    with policy.model.disable_adapter():
        reference = torch.cat(
            [plain_logprobs(policy.model, [4, 5], c) for c in ([7, 9], [8])]
        ).detach()
    gap = reference - logps
    expected = (gap.exp() - gap - 1).sum()
    assert expected.item() > 1e-4
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(
        gradients(policy.model, loss), gradients(policy.model, expected), atol=1e-5, rtol=1e-2
    )


def test_non_finite_gradient_is_skipped_and_leaves_the_adapter_alone(monkeypatch):
    model = lora(random_model("qwen2"))
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setattr(tokenrl, "grpo_weights", lambda trie, rewards: {0: math.nan})
    rollout = tokenrl.Rollout(PROBLEM, [4, 5], [[7, 9], [8]], [1.0, 0.0])
    result = tokenrl.update(
        tokenrl.Policy(model, None, "plain"),
        [rollout],
        tokenrl.new_optimizer(model),
        0.1,
        settings_of(),
        random.Random(0),
    )
    assert result["skipped"] and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["grpo", "t-spmo"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_checkpointing_gives_the_same_gradient(kind, method):
    """Recomputed activations, the same gradient; and a rollout through the wrapped layers samples the same tokens."""
    found = []
    for checkpointing in (False, True):
        wrapped = lora(random_model(kind), checkpointing=checkpointing)
        _, gradient = step_gradient(
            wrapped, random_step(), settings_of(method=method), random.Random(5)
        )
        completions = tokenrl.sample(wrapped, Words(), [[5, 6, 7]], 4, max_new_tokens=12)
        found.append((gradient, completions))
    assert found[0][0].abs().max() > 0 and found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-7, rtol=1e-5)


def test_checkpointing_stores_less():
    """Bytes that autograd keeps for the backward pass of a packed step."""
    kept = {}
    for checkpointing in (False, True):
        model, kept[checkpointing] = lora(random_model("qwen2"), checkpointing=checkpointing), 0

        def count(tensor, key=checkpointing):
            kept[key] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            tokenrl.packed_logprobs(model, [4, 5, 6], tokenrl.Trie([[7] * 40]), [39])
    assert 0 < kept[True] < 0.5 * kept[False]


def test_lower_layers_store_nothing():
    model = tokenrl.add_lora(random_model("qwen2"), 4, 8, "q_proj,v_proj", 1 / 3)
    needs = [layer.self_attn.q_proj for layer in tokenrl.base_of(model).model.layers]
    assert [hasattr(module, "lora_A") for module in needs] == [False, False, False, True]


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_greedy_equals_generate(model, words):
    rng = random.Random(0)
    prompts = [[rng.randrange(2, 97) for _ in range(n)] for n in (3, 9, 5, 1, 12)]
    shared = [rng.randrange(2, 97) for _ in range(6)]
    prompts += [
        shared,
        shared + [7],
        shared + [8, 9, 7],
        shared + [7, 9],
    ]  # these begin alike: computed once
    found = tokenrl.sample(model, words, prompts, 2, max_new_tokens=24, temperature=0, rows=6)
    for prompt, group in zip(prompts, found):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        assert group == [wanted, wanted]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_that_end_do_not_disturb_the_others(kind, words):
    model, rng = random_model(kind), random.Random(0)
    prompts = [[rng.randrange(2, 97) for _ in range(rng.randint(1, 6))] for _ in range(24)]
    common = dict(max_new_tokens=16, temperature=0, ends=set(range(2, 20)))
    together = tokenrl.sample(model, words, prompts, 1, rows=24, **common)
    assert together == [
        tokenrl.sample(model, words, [prompt], 1, **common)[0] for prompt in prompts
    ]
    assert (
        len({len(completion) for [completion] in together}) > 3
    )  # so that rows did end at different times


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sampling_leaves_no_keys_and_values_behind(kind, words):
    def tensors():
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    model = random_model(kind)
    tokenrl.sample(model, words, [[5, 6]], 2, max_new_tokens=4)  # what is made once may stay
    gc.collect()
    gc.disable()  # a process meets the collector only now and then: until then a cycle keeps gigabytes
    try:
        before = tensors()
        tokenrl.sample(model, words, [[5, 6]], 2, max_new_tokens=4)
        assert tensors() == before
    finally:
        gc.enable()


def test_sampling_follows_softmax_and_ignores_the_checkpoints_own_settings(words):
    model = random_model("qwen2")
    model.generation_config.update(
        top_k=2, top_p=0.5, repetition_penalty=5.0, temperature=0.1, do_sample=True
    )
    prompt, temperature, count = [5, 6, 7], 1.7, 20_000
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    wanted = (logits / temperature).softmax(-1)
    [group] = tokenrl.sample(
        model, words, [prompt], count, max_new_tokens=1, temperature=temperature, rows=count
    )
    counts = Counter(completion[0] for completion in group)
    found = torch.tensor([counts[i] / count for i in range(97)])
    assert (found - wanted).abs().sum() / 2 < 0.03  # total variation; 97 cells, 20,000 draws
    assert len([i for i in range(97) if counts[i]]) > 20


def test_second_token_is_sampled_given_the_first_despite_padding_and_dropped_rows(words):
    model = random_model("llama")
    prompts = [[5, 6, 7, 8, 9], [11]]
    groups = tokenrl.sample(
        model, words, prompts, 8000, max_new_tokens=2, rows=16000, temperature=0.5
    )
    for prompt, group in zip(prompts, groups):
        first, number = Counter(c[0] for c in group if c[0] != 1).most_common(1)[0]
        wanted = (model(input_ids=torch.tensor([prompt + [first]])).logits[0, -1] / 0.5).softmax(-1)
        counts = Counter(c[1] for c in group if c[0] == first)
        found = torch.tensor([counts[i] / number for i in range(97)])
        noise = (
            (2 * wanted * (1 - wanted) / (math.pi * number)).sqrt().sum()
        )  # what chance alone adds up to
        assert number > 300 and (found - wanted).abs().sum() < 1.5 * noise


def test_replays_start_by_turns_in_successes_and_failures():
    policy = tokenrl.Policy(None, Words(), "chat")
    group = tokenrl.Rollout(PROBLEM, [1], [[5, 5, 5, 5], [6, 6, 6, 6]], [1.0, 0.0])
    for turns in (range(0, 4), range(1, 4, 2)):  # one process; the second of two
        _, prefixes = tokenrl.replay_points(policy, [group], turns, 9, random.Random(0))
        assert [prefix[0] for prefix in prefixes] == [(5, 6)[turn % 2] for turn in turns]


def test_replays_do_not_start_within_the_stop_text(monkeypatch):
    monkeypatch.setattr(tokenrl.Policy, "stop", "7 8 9 ")
    policy, group = (
        tokenrl.Policy(None, Words(), "plain"),
        tokenrl.Rollout(PROBLEM, [1], [[5, 6, 7, 8, 9]], [1.0]),
    )
    _, prefixes = tokenrl.replay_points(policy, [group], range(40), 9, random.Random(0))
    assert {tuple(prefix) for prefix in prefixes} == {(5,), (5, 6)}


def test_replays_start_in_no_hopeless_group_and_no_cut_off_completion():
    groups = [
        tokenrl.Rollout(PROBLEM, [1], [[7] * 4, [8] * 4], [0.0, 0.0]),
        tokenrl.Rollout(PROBLEM, [1], [[9] * 9, [5] * 4], [1.0, 0.0]),
    ]
    _, prefixes = tokenrl.replay_points(
        tokenrl.Policy(None, Words(), "chat"), groups, range(40), 9, random.Random(0)
    )
    assert {prefix[0] for prefix in prefixes} == {5}


def test_a_replay_is_scored_with_what_it_starts_from():
    policy = tokenrl.Policy(
        random_model("qwen2"),
        Words(),
        "plain",
        score=lambda text, answer: float(text.startswith("7 7 7 ")),
    )
    policy.prompt_ids, policy.finished = lambda question: [5, 6], lambda completion: True
    settings = settings_of(max_new_tokens=9, batch_rows=64, group_size=8)
    [rollout] = tokenrl.roll_out(policy, [PROBLEM], [[7] * 3], settings, seed=0)
    assert rollout.rewards == [1.0] * 8


def test_a_replay_has_no_more_room_than_the_completion_it_ends():
    """Every completion would be right, but what does not end within max_new_tokens, prefix included, earns nothing."""
    policy = tokenrl.Policy(random_model("qwen2"), Words(), "plain", score=lambda text, answer: 1.0)
    policy.prompt_ids = lambda question: [5, 6]
    settings = settings_of(max_new_tokens=24, temperature=9.0, batch_rows=192, group_size=64)
    prefixes = [[], [7] * 9, [7] * 20]
    rollouts = tokenrl.roll_out(policy, [PROBLEM] * 3, prefixes, settings, seed=0)
    for prefix, rollout in zip(prefixes, rollouts):
        assert rollout.prompt == [5, 6, *prefix]
        assert max(map(len, rollout.completions)) == 24 - len(prefix)
        assert rollout.rewards == [completion[-1] == 1 for completion in rollout.completions]
        assert rollout.has_signal
    policy.model.config.max_position_embeddings = (
        26  # the prompt and 24 tokens, wherever a replay starts
    )
    assert len(tokenrl.roll_out(policy, [PROBLEM] * 3, prefixes, settings, seed=0)) == 3


def watched_step(monkeypatch, step=0, **changes):
    """What one train_step asks of sample(), what it hands to update(), and its row."""
    words, asked, given, plain = Words(), [], [], tokenrl.sample
    words.encode = lambda text: [int(token) for token in text.split()]
    model = lora(random_model("qwen2"))
    tokenrl.base_of(model).generation_config.eos_token_id = list(
        range(48)
    )  # so that completions end
    policy = tokenrl.Policy(
        model, words, "{question}", score=lambda text, answer: float(text[0] < "5")
    )
    settings = settings_of(
        **dict(
            temperature=0.7,
            replay=3,
            prompts_per_step=2,
            group_size=16,
            max_new_tokens=9,
            batch_rows=64,
            steps=20,
            lr=1.0,
            seed=0,
        )
        | changes
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            tokenrl,
            "sample",
            lambda *a, **k: asked.append((k["temperature"], k["seed"])) or plain(*a, **k),
        )
        patch.setattr(
            tokenrl,
            "update",
            lambda policy, rollouts, optimizer, lr, *_: (
                given.append((rollouts, lr))
                or {"tokens_trained": 1, "loss": 0.0, "grad_norm": 0.0, "skipped": False}
            ),
        )
        row = tokenrl.train_step(
            policy, [tokenrl.Problem(f"{i} 9", "1") for i in range(2, 12)], None, step, settings
        )
    return asked, *given[0], row


def test_a_step_draws_as_asked_and_trains_its_replays(monkeypatch):
    asked, rollouts, lr, row = watched_step(monkeypatch)
    assert [t for t, _ in asked] == [0.7, 0.7] and len(rollouts) == 2 + 3 and lr == row["lr"] == 0.5
    assert watched_step(monkeypatch)[0] == asked
    others = [watched_step(monkeypatch, **change) for change in ({"step": 1}, {"seed": 1})]
    assert (
        len({seed for calls in (asked, *(other[0] for other in others)) for _, seed in calls}) == 6
    )
    assert [r.problem for r in others[1][1][:2]] != [r.problem for r in rollouts[:2]]


def test_learning_rate_warms_up_and_decays():
    rates = [tokenrl.learning_rate(step, SimpleNamespace(steps=20, lr=1.0)) for step in range(20)]
    assert (
        rates[:2] == [0.5, 1.0]
        and rates[-1] == pytest.approx(0.1)
        and rates[1:] == sorted(rates[1:], reverse=True)
    )


def test_gradients_are_clipped_to_the_norm_asked_for():
    model = lora(random_model("qwen2"))
    _, free = step_gradient(model, random_step(), settings_of(), random.Random(5))
    half = settings_of(max_grad_norm=free.norm().item() / 2)
    report, clipped = step_gradient(model, random_step(), half, random.Random(5))
    torch.testing.assert_close(clipped, free / 2, atol=1e-6, rtol=1e-3)
    assert report["grad_norm"] == pytest.approx(free.norm().item(), rel=1e-3)
    assert tokenrl.new_optimizer(model).defaults["weight_decay"] == 0


@pytest.mark.parametrize("budget", [1024, 1])
def test_beta_weighs_the_mean_kl_of_the_trained_tokens(budget):
    model, rollout = lora(random_model("qwen2")), random_step()[0]
    trie = tokenrl.Trie(rollout.completions)
    nodes = tokenrl.grpo_weights(trie, rollout.rewards)
    _, without = step_gradient(model, [rollout], settings_of(temperature=0.7), random.Random(5))
    settings = settings_of(temperature=0.7, beta=0.5, max_pack_tokens=budget)
    _, found = step_gradient(model, [rollout], settings, random.Random(5))
    kl, seen = 0.0, set()
    for path, completion in zip(trie.paths, rollout.completions):
        logp = plain_logprobs(model, rollout.prompt, completion, 0.7)
        with torch.no_grad(), model.disable_adapter():
            gap = plain_logprobs(model, rollout.prompt, completion, 0.7) - logp.detach()
        fresh = [t for t, node in enumerate(path) if node in nodes and node not in seen]
        seen.update(path)
        kl = kl + (logp * (1 - gap.exp()))[fresh].sum()  # has the gradient of exp(gap) - gap - 1
    wanted = gradients(model, 0.5 * kl / len(nodes))
    torch.testing.assert_close(
        found - without, wanted, atol=1e-3 * wanted.abs().max().item(), rtol=1e-2
    )


def test_a_row_of_metrics_is_of_all_processes():
    fact = lambda rewards, **own: (
        {
            "reward": rewards,
            "tokens_generated": 10,
            "tokens_trained": 4,
            "loss": 0.5,  # noqa: E731
            "grad_norm": 1.0,
            "skipped": False,
            "rollout_s": 1.0,
            "update_s": 2.0,
            "peak_memory": 3,
        }
        | own
    )
    row = tokenrl.metrics_row(
        4, 0.1, [fact([1.0, 0.5]), fact([1.0, 1.0, 0.0, 0.0], rollout_s=5.0, skipped=True)]
    )
    assert row["reward"] == pytest.approx(3.5 / 6) and row["accuracy"] == 0.5 and row["step"] == 5
    assert (row["tokens_generated"], row["tokens_trained"], row["loss"]) == (20, 8, 1.0)
    assert row["rollout_s"] == 5.0 and row["skipped"]


def test_every_end_token_stops_and_is_kept(words):
    model = random_model("qwen2")
    model.generation_config.eos_token_id = [30, 31]
    model.config.eos_token_id = 32
    assert tokenrl.end_tokens(model, words) == {1, 30, 31, 32}
    ends = set(range(20, 60))
    for group in tokenrl.sample(
        model, words, [[5], [6, 7]], 40, max_new_tokens=12, ends=ends, temperature=3.0
    ):
        assert any(c[-1] in ends for c in group)
        for completion in group:
            assert not ends & set(completion[:-1])
            assert completion[-1] in ends or len(completion) == 12


def test_no_more_rows_at_a_time_than_asked_for(words, monkeypatch):
    rows, plain = [], tokenrl._sample_batch
    monkeypatch.setattr(
        tokenrl,
        "_sample_batch",
        lambda model, tokenizer, prompts, group_size, *rest: (
            rows.append(len(prompts) * group_size)
            or plain(model, tokenizer, prompts, group_size, *rest)
        ),
    )
    groups = tokenrl.sample(
        random_model("qwen2"), words, [[5, 6], [7]], 8, max_new_tokens=6, rows=3
    )
    assert rows == [3, 3, 2] * 2 and [len(group) for group in groups] == [8, 8]
    assert len({tuple(completion) for completion in groups[0]}) > 3  # each part draws anew


def test_end_tokens_of_a_config_that_names_none():
    vision = transformers.Gemma3Config(text_config={"eos_token_id": 7})
    assert tokenrl.end_tokens(SimpleNamespace(config=vision, generation_config=None)) == {7}


@pytest.mark.parametrize("length", [2, 18])
def test_stop_text_ends_a_completion(words, length):
    model = random_model("qwen2")
    [free] = tokenrl.sample(model, words, [[5, 6]], 1, max_new_tokens=30, temperature=0, ends=set())
    stop = " ".join(map(str, free[0][6 : 6 + length]))
    [stopped] = tokenrl.sample(
        model, words, [[5, 6]], 1, max_new_tokens=30, temperature=0, ends=set(), stop=stop
    )
    text = words.decode(free[0])
    assert words.decode(stopped[0]).rstrip() == text[: text.index(stop) + len(stop)].rstrip()


def test_samples_leave_the_greedy_batches_as_they_are(words, monkeypatch):
    """In bfloat16 the width of a batch decides close calls: greedy accuracy must not depend on how many are sampled."""
    words.encode = lambda text: [int(token) for token in text.split()]
    policy = tokenrl.Policy(random_model("qwen2"), words, "{question}")
    problems = [tokenrl.Problem(f"{2 + i} {2 + 7 * i % 90}", "1") for i in range(50)]
    settings = SimpleNamespace(batch_rows=20, max_new_tokens=8, temperature=1.0, seed=0)
    asked, told, plain = [], [], tokenrl.sample
    monkeypatch.setattr(
        tokenrl, "bar", lambda *_: contextlib.nullcontext(lambda advance: told.append(advance))
    )
    monkeypatch.setattr(
        tokenrl,
        "sample",
        lambda model, tokenizer, prompts, count, **rest: (
            asked.append((prompts, count, rest["temperature"]))
            or plain(model, tokenizer, prompts, count, **rest)
        ),
    )
    alone = tokenrl.evaluate(policy, problems, settings)
    greedy, asked[:], told[:] = list(asked), [], []
    beside = tokenrl.evaluate(policy, problems, settings, samples=5)
    assert [call for call in asked if call[2] == 0] == greedy
    assert all(len(prompts) * count <= 20 for prompts, count, _ in asked)
    assert [record["completion"] for record in beside] == [record["completion"] for record in alone]
    assert {record["samples"] for record in beside} == {5} and sum(told) == 50 * (1 + 5)


def test_evaluation_counts_what_each_sample_earned(words, monkeypatch):
    words.encode, calls = (lambda text: [5]), []
    policy = tokenrl.Policy(
        random_model("qwen2"),
        words,
        "{question}",
        score=lambda text, answer: 1.0 if text.split()[0] == answer else 0.5,
    )

    def scripted(model, tokenizer, prompts, count, *, temperature, seed, **_):
        calls.append((temperature, seed))
        return [
            [[6, 1]] if count == 1 else [[6, 1], [7, 1], [6]] for _ in prompts
        ]  # the last is cut off

    monkeypatch.setattr(tokenrl, "sample", scripted)
    settings = SimpleNamespace(batch_rows=3, max_new_tokens=8, temperature=0.7, seed=0)
    records = tokenrl.evaluate(
        policy, [tokenrl.Problem(f"q{i}", i) for i in "67"], settings, samples=3
    )
    assert [(r["correct"], r["samples_correct"], r["length"]) for r in records] == [
        (True, 1, 2),
        (False, 1, 2),
    ]
    assert [t for t, _ in calls] == [0.0, 0.7, 0.7] and calls[1][1] != calls[2][1]


def test_the_stop_text_finishes_a_completion_and_is_not_scored(words):
    words.decode = lambda ids, **_: "".join({6: " 2", 7: "\nQuestion:", 8: " 9"}[i] for i in ids)
    policy, problem = (
        tokenrl.Policy(random_model("qwen2"), words, "plain"),
        tokenrl.Problem("1+1?", "2"),
    )
    assert [policy.reward(problem, c) for c in ([6, 7], [6, 7, 8], [6])] == [1.0, 1.0, 0.0]


def test_the_same_seed_gives_the_same_samples(words):
    model = random_model("qwen2")
    draw = lambda seed: tokenrl.sample(model, words, [[5, 6], [7]], 4, max_new_tokens=9, seed=seed)  # noqa: E731
    assert draw(3) == draw(3) != draw(4)
