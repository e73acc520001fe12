"""Credit functions from papers, and one of our own, as plug-ins: a method is a dozen lines.

    python tokenrl.py train svamp --method data/methods.py:tempo
    python tests/compare_methods.py --methods s-grpo data/methods.py:tempo YOURS.py:yours

A credit function is given the trie of one group (see Trie in tokenrl.py), the rewards of its
completions and a random generator, and returns {node: weight}. The loss is minus the sum of
weight * log pi over these nodes, averaged over groups; a group of equal rewards never gets here.
Numbers that one may want to change are keyword defaults.

In the formulas R_i is the reward of completion i, len_i the number of its tokens, G the number of
completions and A_i = (R_i - mean R) / (std R + eps); a node gets the sum over the completions i
through it. What is common to all: a node of weight zero is left out, so that it costs nothing.
"""

import math
import statistics
from collections import defaultdict


def advantages(rewards, eps=1e-4):
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(reward - mean) / (std + eps) for reward in rewards]


def values(trie, rewards):
    """{node: mean reward of the completions through it}; -1 is the prompt, which all go through."""
    through = defaultdict(list)
    for path, reward in zip(trie.paths, rewards):
        for node in [-1, *path]:
            through[node].append(reward)
    return {node: statistics.fmean(passing) for node, passing in through.items()}


def nonzero(weights):
    return {node: weight for node, weight in weights.items() if abs(weight) > 1e-9}


def token_mean(trie, rewards, rng):
    """All tokens of a group count alike, and rewards are not divided by their spread:

        sum of (R_i - mean R) / (len_1 + ... + len_G)

    Dr. GRPO (arXiv 2503.20783) drops std R, which overrates very easy and very hard problems;
    DAPO (arXiv 2503.14476) drops len_i, which is lenient with long wrong answers.
    """
    weights, mean = defaultdict(float), statistics.fmean(rewards)
    tokens = sum(map(len, trie.paths))
    for path, reward in zip(trie.paths, rewards):
        for node in path:
            weights[node] += (reward - mean) / tokens
    return nonzero(weights)


def top_entropy(trie, rewards, rng, share=0.2):
    """GRPO on the `share` of the group's tokens that were drawn with the highest entropy ("Beyond
    the 80/20 rule", arXiv 2506.01939, which ranks a whole batch and divides as DAPO does):

        sum of A_i / (G * len_i)    where the entropy is among the highest `share`
    """
    entropies = sorted((trie.entropies[n] for path in trie.paths for n in path), reverse=True)
    threshold = entropies[max(0, math.ceil(share * len(entropies)) - 1)]
    weights = defaultdict(float)
    for path, advantage in zip(trie.paths, advantages(rewards)):
        for node in path:
            if trie.entropies[node] >= threshold:
                weights[node] += advantage / (len(rewards) * len(path))
    return nonzero(weights)


def prefix_cut(trie, rewards, rng, least=4):
    """NAT's random prefix cut (arXiv 2603.06619): completion i keeps its first c tokens, c drawn
    evenly from m = min(least, len_i) to len_i. On average this is GRPO, and what lies behind the
    cuts needs no pass. For a token at depth t, counted from 0:

        sum of A_i / (G * len_i * P(c > t)),   P(c > t) = min(1, (len_i - t) / (len_i - m + 1))
    """
    weights = defaultdict(float)
    for path, advantage in zip(trie.paths, advantages(rewards)):
        length, m = len(path), min(least, len(path))
        for t, node in enumerate(path[: rng.randint(m, length)]):
            kept = min(1, (length - t) / (length - m + 1))
            weights[node] += advantage / (len(rewards) * length * kept)
    return nonzero(weights)


def tempo(trie, rewards, rng):
    """TEMPO (arXiv 2509.18314): GRPO and, where completions branch, the temporal difference of V,
    the mean reward of the completions through a node:

        sum of (R_i - mean R + V(node) - V(parent)) / (std R + eps) / (G * len_i)
    """
    scaled = advantages(rewards)
    weights, value = defaultdict(float), values(trie, scaled)
    for path, advantage in zip(trie.paths, scaled):
        for node in path:
            difference = value[node] - value[trie.parents[node]]  # 0 where nothing branches
            weights[node] += (advantage + difference) / (len(rewards) * len(path))
    return nonzero(weights)


def credit_over_others(trie, rewards):
    """{node: sum of R_i - mean R of the other completions through its parent}; if there are none,
    through its last ancestor that others share. No bias: the others know nothing of the token."""
    total, count, credit = defaultdict(float), defaultdict(int), defaultdict(float)
    for path, reward in zip(trie.paths, rewards):
        for node in [-1, *path]:
            total[node] += reward
            count[node] += 1
    for path, reward in zip(trie.paths, rewards):
        for parent, node in zip([-1, *path], path):
            if count[parent] > 1:
                others = (total[parent] - reward) / (count[parent] - 1)
            credit[node] += reward - others
    return nonzero(credit)


def within_reach(trie, pull, price):
    """The nodes that can be trained where a token is packed only if it gains: if the pull of its
    children, with what gains behind them, is over `price` a packed token."""
    gain = dict.fromkeys(range(-1, len(pull)), -price)
    for node in reversed(range(len(pull))):  # children before their parents
        gain[trie.parents[node]] += pull[node] + max(0.0, gain[node])
    packed = {-1}
    for node, parent in enumerate(trie.parents):
        if parent in packed and gain[node] > 0:
            packed.add(node)
    return [node for node, parent in enumerate(trie.parents) if parent in packed]


def worthwhile(trie, rewards, rng):
    """Ours, with no number to set: the choices that mattered, as far as they are worth a pass. The
    credit of a node is unbiased (see credit_over_others; at a branch it is T-SPMO's times a count),
    and 1 - pi is how far log pi moves with its logit: hardly, where the model was sure.

        pull = |credit| * (1 - pi)       price of a packed token = sum of pull / (nodes + 1)
        weight = credit / number of trained nodes    where pull > price, within reach at that price
    """
    credit = credit_over_others(trie, rewards)
    pull = [abs(credit.get(n, 0)) * (1 - math.exp(logp)) for n, logp in enumerate(trie.logprobs)]
    price = sum(pull) / (len(pull) + 1)
    chosen = [node for node in within_reach(trie, pull, price) if pull[node] > price]
    return {node: credit[node] / len(chosen) for node in chosen}
