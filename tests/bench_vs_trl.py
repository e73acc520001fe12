"""tokenrl beside TRL's GRPOTrainer: the same model, prompts, completions, rewards and LoRA in one run on one machine.

    pip install trl                                # for this benchmark only
    python tokenrl.py prep svamp
    python tests/bench_vs_trl.py --model FOLDER --data-dir data --output bench.json

Every measurement is a fresh process, so that no engine's memory or caches touch another's; the engines take turns.
Three tables: update, memory, rollout and whole step, with ratios; growth with group, completion and prompt length; and
how far each is from what the machine's own matrix rate and memory bandwidth allow, and torch's kernels by themselves.
"""

import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenrl  # noqa: E402

METHODS = ("grpo", "s-grpo", "t-spmo")
TRL = {"trl": "TRL", "trl-tuned": "TRL*"}  # its defaults; and faster than them, see run_trl
ENGINES = (*TRL, *METHODS)
LIMIT = 900  # seconds for one measurement, its loading included
GROWTH_LIMIT = 150  # the same where cases grow and are measured once
GIB = 2**30
console = Console(highlight=False)


# In the child: one measurement, printed as one line of JSON


class Meter:
    """Seconds, and peak memory above what was held at the start, which is the weights and the adapter."""

    def __init__(self, device: str):
        self.device = device

    def now(self) -> float:
        if self.device.startswith("cuda"):
            tokenrl.torch.cuda.synchronize()
        return time.perf_counter()

    def held(self) -> int:
        if self.device.startswith("cuda"):
            return tokenrl.torch.cuda.memory_allocated()
        with contextlib.suppress(OSError):
            return (
                int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
            )
        return 0

    def start(self) -> None:
        gc.collect()
        self.before = self.held()
        tokenrl.peak_memory(self.device, reset=True)
        self.started = self.now()

    def stop(self) -> dict:
        seconds = self.now() - self.started
        return {
            "update_s": seconds,
            "held": self.before,
            "peak": tokenrl.peak_memory(self.device) - self.before,
        }


def child(job: dict) -> dict:
    with contextlib.suppress(
        OSError
    ):  # if memory runs out, the system is to end this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    asked = {key: job[key] for key in ("model", "task", "dtype", "max_pack_tokens")}
    method = job["engine"] if job["engine"] in METHODS else "grpo"
    settings = tokenrl.Settings(**asked, method=method, data_dir=Path(job["data_dir"]))
    policy, task = tokenrl.find_policy(settings)
    problems = task.train
    tokenrl.torch.manual_seed(0)
    policy.model = tokenrl.trainable_model(policy, settings)
    if "gradient" in job:  # at its start, LoRA's B is zero, and with it the gradient of A
        with tokenrl.torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
    if job["engine"] == "sample":
        return sample_all(job, policy, problems)
    if job["engine"] == "limit":
        return machine_limit(policy.model)
    groups = json.loads(Path(job["file"]).read_text())[job["case"]]
    first = groups[0]["prompt"]
    warm = [{"prompt": first[:16], "completions": [first[:8], first[1:9]], "rewards": [1.0, 0.0]}]
    return (run_trl if job["engine"] in TRL else run_tokenrl)(job, policy, settings, warm, groups)


def sample_all(job: dict, policy, problems: list) -> dict:
    """Sample once what all engines get to train on, and write it to job["file"]."""
    asked = tokenrl.step_problems(problems, 0, job["prompts"], 0)
    prompts = [policy.prompt_ids(problem.question) for problem in asked]
    never: set[int] = set()  # no end tokens: completions of exactly the length wanted

    def draw(prompts, size, length, ends=None):
        return tokenrl.sample(
            policy.model,
            policy.tokenizer,
            prompts,
            size,
            max_new_tokens=length,
            ends=ends,
            rows=len(prompts) * size,
        )

    def group(prompt, completions, rewards=()):  # every group must have signal
        rewards = (
            rewards
            if len(set(rewards)) > 1
            else [float(i % 2 == 0) for i in range(len(completions))]
        )
        return {"prompt": prompt, "completions": completions, "rewards": rewards}

    sampled = draw(prompts, job["group_size"], job["max_new_tokens"])
    cases = {
        "main": [
            group(prompt, completions, [policy.reward(problem, c) for c in completions])
            for problem, prompt, completions in zip(asked, prompts, sampled)
        ]
    }
    short = [[completion[:64] for completion in completions[:4]] for completions in sampled[:2]]
    cases["gradient"] = list(map(group, prompts, short))
    if job["growth"]:
        real = prompts[0]
        [wide], [long] = draw([real], 32, 256, never), draw([real], 8, 1024, never)
        cases |= {f"group {size} x 256": [group(real, wide[:size])] for size in (4, 8, 16, 32)}
        cases["length 8 x 64"] = [group(real, [completion[:64] for completion in wide[:8]])]
        cases["length 8 x 1024"] = [group(real, long)]
        for length in (32, 256, 1024):
            prompt = (real * (length // len(real) + 1))[:length]
            cases[f"prompt {length}, 8 x 64"] = [group(prompt, draw([prompt], 8, 64, never)[0])]
    Path(job["file"]).write_text(json.dumps(cases))
    return {
        "cases": list(cases),
        "prompt_lengths": [len(prompt) for prompt in prompts],
        "lengths": [len(completion) for completions in sampled for completion in completions],
    }


def rollout_result(seconds: float, groups: list[dict], completions: list[list[int]]) -> dict:
    """`prompt_tokens`: those that must be computed, shared beginnings once."""
    return {
        "rollout_s": seconds,
        "lengths": [len(completion) for completion in completions],
        "prompt_tokens": len(tokenrl.Trie([group["prompt"] for group in groups]).tokens),
    }


def run_tokenrl(job: dict, policy, settings, warm: list[dict], groups: list[dict]) -> dict:
    meter, optimizer = (
        Meter(str(tokenrl.base_of(policy.model).device)),
        tokenrl.new_optimizer(policy.model),
    )
    packs, pack, method = [], tokenrl.pack, tokenrl.credit_function(settings)

    def counting_pack(
        prompt, trie, nodes
    ):  # what the update really computes: tokens, and rows of logits
        packed = pack(prompt, trie, nodes)
        packs.append((len(packed[0]), len({trie.parents[node] for node in nodes})))
        return packed

    tokenrl.pack = counting_pack

    def update(
        groups,
    ):  # with credit, and at a learning rate of 0, so that each repetition is alike
        rollouts = [tokenrl.Rollout(None, **group) for group in groups]
        credited = tokenrl.credit(rollouts, method, random.Random(job["repeat"]))
        return tokenrl.update(policy, credited, len(rollouts), optimizer, settings)[0]

    update(warm)
    packs.clear()
    if "gradient" in job:
        optimizer.register_step_pre_hook(
            lambda *_: tokenrl.torch.save(lora_gradient(policy.model), job["gradient"])
        )
    meter.start()
    updated = update(groups)
    result = meter.stop() | {"packs": packs, "tokens_trained": updated["tokens_trained"]}
    if job["rollout"]:
        prompts, size = [group["prompt"] for group in groups], len(groups[0]["completions"])
        sample = lambda length: tokenrl.sample(  # noqa: E731
            policy.model,
            policy.tokenizer,
            prompts,
            size,
            max_new_tokens=length,
            rows=len(prompts) * size,
            seed=job["repeat"],
        )
        sample(4)
        start = meter.now()
        sampled = sample(job["max_new_tokens"])
        result |= rollout_result(meter.now() - start, groups, sum(sampled, []))
    return result | (kernels_alone(policy.model, result, meter) if job["case"] == "main" else {})


def kernels_alone(model, result: dict, meter: Meter) -> dict:
    """Seconds that the matrix products and the attention of the update, and the matrix products of the rollout, take by
    themselves, the best of three passes: the model's own weights, torch's own kernels, and the numbers of rows that the
    update packed and the rollout decoded together. Nothing that is made of these kernels can be faster."""
    torch, base, inputs = tokenrl.torch, tokenrl.base_of(model), {}  # inputs by shape
    config, like = base.config.get_text_config(), {"dtype": base.dtype, "device": base.device}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head, forward, backward, trained = base.get_output_embeddings().weight, [], [], []
    for layer in base.get_decoder().layers:
        weights = [p for p in layer.parameters() if p.dim() == 2 and not p.requires_grad]
        forward += weights
        trained.append(
            bool(backward) or any(p.requires_grad for p in layer.parameters())
        )  # from the first with LoRA
        backward += [weight.T for weight in weights if trained[-1]]

    def multiply(weights: list, rows: int) -> None:
        for weight in weights:
            shape = (rows, weight.shape[1])
            if shape not in inputs:
                inputs[shape] = torch.ones(shape, **like)
            torch.nn.functional.linear(inputs[shape], weight)

    def attend(tokens: int) -> None:  # a mask as dense as a pack's; keys repeated for all heads
        mask = torch.full((1, 1, tokens, tokens), torch.finfo(base.dtype).min, **like).triu(1)
        qkv = torch.ones(3, 1, config.num_attention_heads, tokens, width, **like).unbind()
        for learns in trained:
            with torch.set_grad_enabled(learns):
                for x in qkv:
                    x.requires_grad_(learns)
                out = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask)
            if learns:
                torch.autograd.grad(out, qkv, out)

    def update() -> None:
        for tokens, rows in result["packs"]:
            multiply(forward + backward, tokens)
            attend(tokens)
            for start in range(0, rows, tokenrl.TRAINED_ROWS):
                multiply([head, head.T], min(tokenrl.TRAINED_ROWS, rows - start))

    def rollout() -> None:
        multiply(forward, result["prompt_tokens"])
        for rows in decoded_rows(result):
            multiply([*forward, head], rows)

    def seconds(work) -> float:
        start = meter.now()
        work()
        return meter.now() - start

    with torch.no_grad():
        return {
            f"{work.__name__}_kernels_s": min(seconds(work) for _ in range(3))
            for work in ([update, rollout] if "lengths" in result else [update])
        }


def lora_gradient(model):
    """All trainable gradients as one vector."""
    return tokenrl.torch.cat(
        [p.grad.flatten().double() for _, p in sorted(model.named_parameters()) if p.requires_grad]
    )


def trl_inputs(groups: list[dict], pad: int, device) -> dict:
    """What GRPOTrainer._generate_and_score_completions hands to the loss: prompts padded left, completions right."""
    torch = tokenrl.torch
    prompts = [group["prompt"] for group in groups for _ in group["completions"]]
    completions = [completion for group in groups for completion in group["completions"]]
    wide, long = max(map(len, prompts)), max(map(len, completions))
    rewards = torch.tensor([group["rewards"] for group in groups])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    inputs = {
        "prompt_ids": [[pad] * (wide - len(ids)) + ids for ids in prompts],
        "prompt_mask": [[0] * (wide - len(ids)) + [1] * len(ids) for ids in prompts],
        "completion_ids": [ids + [pad] * (long - len(ids)) for ids in completions],
        "completion_mask": [[1] * len(ids) + [0] * (long - len(ids)) for ids in completions],
        "num_items_in_batch": sum(map(len, completions)),
    }
    return {key: torch.tensor(value).to(device) for key, value in inputs.items()} | {
        "advantages": advantages.flatten().to(device)
    }


def run_trl(job: dict, policy, settings, warm: list[dict], groups: list[dict]) -> dict:
    """A real GRPOTrainer.train() of two steps, the warm-up and the measured one, which is fed prepared inputs.

    TRL gets: the weights in the model's own dtype (by itself it loads float32), the plain autocast of its bf16 option,
    the same LoRA, no reference model (beta 0), no log-probs of an old policy (num_iterations 1), batches of one prompt,
    accumulated (its default is 8 completions), and its defaults: fused LM head, fused AdamW, gradient checkpointing.
    "trl-tuned" is better than what its options give: no checkpointing, and without Triton (on a CPU) still logits at
    the completions only, where TRL by itself computes them at the prompts too. The learning rate is 0 for both tools,
    so that all see the same adapter. Padding and advantages are not counted in TRL's time; tokenrl's trie and credit are in its own.
    """
    import datasets
    import trl

    torch, base, meter = (
        tokenrl.torch,
        tokenrl.base_of(policy.model),
        Meter(str(tokenrl.base_of(policy.model).device)),
    )
    prompts, size = (
        [group["prompt"] for group in groups for _ in group["completions"]],
        len(groups[0]["completions"]),
    )
    # Nothing of the checkpoint's own sampling settings (top_k, penalties, ...) may slip in; it ends where tokenrl ends.
    base.generation_config = tokenrl.transformers.GenerationConfig(
        eos_token_id=sorted(tokenrl.end_tokens(policy.model, policy.tokenizer))
    )
    if job["engine"] == "trl-tuned":
        trl.trainer.utils._use_triton = lambda device: (
            True
        )  # the LM head's choice of rows; its kernels ask elsewhere
    result, batches = {}, [warm] * len(groups) + [[group] for group in groups]  # of both steps

    class Fed(trl.GRPOTrainer):
        def _prepare_inputs(self, batch):  # in train(), where a step's rollout would be
            pad, device = self.processing_class.pad_token_id, self.accelerator.device
            inputs = trl_inputs(batches.pop(0), pad, device)
            if len(batches) % len(groups) == len(groups) - 1:  # the first of its step
                meter.start()
            return inputs

    class Watch(tokenrl.transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            if state.global_step and "gradient" in job:
                ours, theirs = torch.load(job["gradient"]), lora_gradient(policy.model)
                result["cosine"] = torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item()

        def on_step_end(self, args, state, control, **_):
            result.update(meter.stop())

    def no_reward(completions, **_):
        return [0.0] * len(completions)

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder,
            loss_type="grpo",
            beta=0.0,
            num_iterations=1,
            max_steps=2,
            learning_rate=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=len(groups),
            num_generations=size,
            bf16=base.dtype == torch.bfloat16,
            gradient_checkpointing=job["engine"] == "trl",
            max_completion_length=job["max_new_tokens"],
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            max_grad_norm=tokenrl.MAX_GRAD_NORM,
            use_cpu=meter.device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Fed(
            policy.model,
            no_reward,
            arguments,
            processing_class=policy.tokenizer,
            callbacks=[Watch()],
            train_dataset=datasets.Dataset.from_dict({"prompt": ["unused"] * 2 * len(groups)}),
        )
        trainer.train()
    if job["rollout"]:
        torch.manual_seed(job["repeat"])
        generate = lambda: trainer._generate_single_turn(prompts, None, {}, size)[0]  # noqa: E731
        trainer.generation_config.max_new_tokens = 4
        generate()
        trainer.generation_config.max_new_tokens = job["max_new_tokens"]
        start = meter.now()
        sampled = generate()
        result |= rollout_result(meter.now() - start, groups, sampled)
    return result


def machine_limit(model) -> dict:
    """The machine's matrix rate at several numbers of rows, its bandwidth when it decodes, and the model's size."""
    torch, base = tokenrl.torch, tokenrl.base_of(model)
    config, like = base.config.get_text_config(), {"dtype": base.dtype, "device": base.device}
    meter, sizes, trained = Meter(str(base.device)), [], []
    for layer in base.get_decoder().layers:
        sizes.append(
            sum(p.numel() for p in layer.parameters() if p.dim() == 2 and not p.requires_grad)
        )
        trained.append(any(p.requires_grad for p in layer.parameters()))

    def best(x, weights: list) -> float:
        """Seconds for x times each of the weights, the best of seven passes."""
        seconds = []
        for _ in range(7):
            start = meter.now()
            for weight in weights:
                torch.nn.functional.linear(x, weight)
            seconds.append(meter.now() - start)
        return min(seconds)

    def rate(
        rows: int,
    ) -> float:  # the better of the MLP's two shapes, on weights that may stay in the cache
        many, shape = max(1, 1024 // rows), (config.intermediate_size, config.hidden_size)
        return max(
            2
            * rows
            * out
            * into
            * many
            / best(torch.randn(rows, into, **like), [torch.randn(out, into, **like)] * many)
            for out, into in (shape, shape[::-1])
        )

    with torch.inference_mode():
        rates = {rows: rate(rows) for rows in (1, 8, 16, 32, 64, 1024)}
        bandwidth = 0.0  # 512 MiB of weights are beyond any cache; a CPU may read one dtype faster than another
        for dtype in {base.dtype, torch.float32}:
            weights = [
                torch.ones(2**24 // dtype.itemsize, 4, dtype=dtype, device=base.device).view(
                    4096, -1
                )
                for _ in range(8)
            ]
            seconds = best(
                torch.ones(1, weights[0].shape[1], dtype=dtype, device=base.device), weights
            )
            bandwidth = max(bandwidth, 2**29 / seconds)
    name = platform.processor()
    with contextlib.suppress(OSError, TypeError):
        name = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    return {
        "rates": rates,
        "bandwidth": bandwidth,
        "layers": sum(sizes),
        "upper": sum(sizes[trained.index(True) :]),
        "head": config.vocab_size * config.hidden_size,
        "bytes": base.dtype.itemsize,
        "dtype": str(base.dtype)[6:],
        "device": torch.cuda.get_device_name()
        if meter.device.startswith("cuda")
        else f"CPU, {name}",
        "threads": torch.get_num_threads(),
    }


# In the parent: run the children, compare, show


def measure(job: dict, limit: float = LIMIT) -> dict:
    """What the child printed, or {"failed": why} where memory or time ran out. Any other error ends the benchmark."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "child"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"over {limit} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode in (-9, 137) or re.search(
        "out of memory|n.t allocate memory|not enough memory|MemoryError", done.stderr
    ):
        return {"failed": "out of memory"}
    console.print(f"{job['engine']}, {job['case']}: failed.\n{done.stderr[-3000:]}", markup=False)
    raise typer.Exit(1)


def update_bound(result: dict, limit: dict) -> float:
    """Seconds that the needed multiplications take at the machine's best rate: forward through all layers, backward
    through those from the first with LoRA on, logits there and back. Left out, as it is small: attention scores, LoRA
    itself, everything element by element."""
    tokens, rows = (sum(column) for column in zip(*result["packs"]))
    return (tokens * 2 * (limit["layers"] + limit["upper"]) + rows * 4 * limit["head"]) / limit[
        "rates"
    ]["1024"]


def decoded_rows(result: dict) -> list[int]:
    """How many completions are still going, for each position after the first."""
    return [
        sum(length > position for length in result["lengths"])
        for position in range(1, max(result["lengths"]))
    ]


def rollout_bound(result: dict, limit: dict) -> float:
    """Prompts at the best rate; then for each decoded position either reading all weights or multiplying them by the
    rows that are still going, whichever takes longer. Left out: the cache of keys and values, the sampling itself."""
    weights, seconds = (
        limit["layers"] + limit["head"],
        result["prompt_tokens"] * 2 * limit["layers"],
    )
    seconds /= limit["rates"]["1024"]
    for rows in decoded_rows(result):
        rate = next(
            limit["rates"][size]
            for size in sorted(limit["rates"], key=int)
            if int(size) >= min(rows, 1024)
        )
        seconds += max(weights * limit["bytes"] / limit["bandwidth"], rows * 2 * weights / rate)
    return seconds


QUANTITIES = {
    "update s": lambda r: r["update_s"],
    "update GiB": lambda r: r["peak"] / GIB,
    "rollout s": lambda r: r["rollout_s"],
    "tokens/s": lambda r: sum(r["lengths"]) / r["rollout_s"],
    "step s": lambda r: r["rollout_s"] + r["update_s"],
}


def values(results: list[dict], quantity) -> list[float] | str:
    """One value per repetition, or why there is none."""
    try:
        return [quantity(result) for result in results]
    except KeyError:
        return next((result["failed"] for result in results if "failed" in result), "-")


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main_table(main: dict[str, list[dict]]) -> Table:
    table = Table(
        "", "", title="main setting (update GiB: peak above the weights)", title_justify="left"
    )
    for title in (escape("median [min..max]"), *(f"{label} / this" for label in TRL.values())):
        table.add_column(title, justify="right", no_wrap=True)
    for name, quantity in QUANTITIES.items():
        found = {engine: values(results, quantity) for engine, results in main.items()}
        if name in ("rollout s", "tokens/s"):
            found = {"trl": found["trl"], "tokenrl": found["grpo"]}
        for engine, mine in found.items():
            cells = (
                [mine]
                if isinstance(mine, str)
                else [
                    f"{number(statistics.median(mine))} [{number(min(mine))}..{number(max(mine))}]"
                ]
            )
            if engine not in TRL and not isinstance(mine, str):
                cells += [
                    "-"
                    if isinstance(other := found.get(base, "-"), str)
                    else f"{statistics.median(other) / statistics.median(mine):.2f}"
                    for base in TRL
                ]
            table.add_row(
                name if engine == "trl" else "",
                TRL.get(engine, engine),
                *map(escape, cells),
                end_section=engine == list(found)[-1],
            )
    return table


def growth_table(growth: dict[str, dict[str, dict]]) -> Table:
    table = Table(
        "", title="growth, one prompt: update s / peak GiB above the weights", title_justify="left"
    )
    for engine in growth["group 8 x 256"]:
        table.add_column(TRL.get(engine, engine), justify="right")
    for case, row in growth.items():
        table.add_row(
            case,
            *(
                r.get("failed") or f"{r['update_s']:.2f} / {r['peak'] / GIB:.2f}"
                for r in row.values()
            ),
        )
    return table


def limit_table(main: dict[str, list[dict]], limit: dict) -> Table:
    """Fractions are medians over the repetitions; TRL's update is held against what its own method, grpo, needs.
    For the kernels alone see kernels_alone."""
    title = (
        f"limit: {limit['rates']['1024'] / 1e9:,.0f} GFLOP/s at 1024 rows, {limit['bandwidth'] / 1e9:.1f} GB/s "
        f"({limit['dtype']}, threads: {limit['threads']})"
    )
    table = Table("seconds", "", title=title, title_justify="left")
    for column in ("measured", "limit", "limit / measured", "kernels alone", "kernels / measured"):
        table.add_column(column, justify="right")
    for work, bound, engines in (
        ("update", update_bound, main),
        ("rollout", rollout_bound, ("trl", "grpo")),
    ):
        for engine in engines:
            needs = main["grpo" if work == "update" and engine in TRL else engine]
            measured = values(main[engine], lambda result: result[f"{work}_s"])  # noqa: B023
            cells = [measured if isinstance(measured, str) else number(statistics.median(measured))]
            for least in (
                values(needs, lambda result: bound(result, limit)),  # noqa: B023
                values(main[engine], lambda result: result[f"{work}_kernels_s"]),
            ):  # noqa: B023
                cells += (
                    ["-", "-"]
                    if str in (type(least), type(measured))
                    else [
                        number(statistics.median(least)),
                        f"{statistics.median(b / m for b, m in zip(least, measured)):.0%}",
                    ]
                )
            table.add_row(work if engine == "trl" else "", TRL.get(engine, engine), *cells)
        table.add_section()
    return table


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.", exists=True, file_okay=False)],
    data_dir: Annotated[Path, typer.Option(help="Where prepared tasks live.")] = tokenrl.DATA,
    task: Annotated[str, typer.Option(help="A prepared task.")] = "svamp",
    repeats: Annotated[int, typer.Option(help="Repetitions of the main setting.", min=1)] = 5,
    prompts: Annotated[int, typer.Option(help="Prompts a step.", min=1)] = 2,
    group_size: Annotated[int, typer.Option(help="Completions a prompt.", min=2)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion.", min=2)] = 200,
    max_pack_tokens: Annotated[int | None, typer.Option(help="As in train.", min=1)] = None,
    growth: Annotated[
        bool, typer.Option(help="Also vary group, completion and prompt length.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option(help="Write every raw measurement to this JSON file.")
    ] = None,
):
    """Measure tokenrl's three methods beside TRL's GRPOTrainer."""
    if not importlib.util.find_spec("trl"):
        console.print(
            "This benchmark compares with TRL, which is not installed here: pip install trl"
        )
        raise typer.Exit(1)
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "model": str(model),
            "task": task,
            "data_dir": str(data_dir),
            "dtype": "auto",
            "case": "main",
            "file": f"{folder}/completions.json",
            "max_new_tokens": max_new_tokens,
            "max_pack_tokens": max_pack_tokens,
            "repeat": 0,
            "rollout": False,
        }

        def run(name: str, limit: float = LIMIT, **job) -> dict:
            result = measure(common | job, limit)
            shown = [
                f"{key} {result[key]:.4g}"
                for key in ("update_s", "rollout_s", "cosine")
                if key in result
            ]
            console.print(
                f"{name}: {result.get('failed') or ', '.join(shown) or 'done'}", soft_wrap=True
            )
            return result

        # Not a measurement, so it may take its time: with growth, 2 x 1,000 decoded positions.
        sampled = run(
            "sampling the completions",
            1800,
            engine="sample",
            prompts=prompts,
            group_size=group_size,
            growth=growth,
        )
        limit = run("the machine's limit", engine="limit")
        if failed := [result["failed"] for result in (sampled, limit) if "failed" in result]:
            console.print(f"Cannot go on: {failed[0]}.")
            raise typer.Exit(1)
        cosines = {}
        for dtype in dict.fromkeys((limit["dtype"], "float32")):
            for engine in (
                "grpo",
                "trl",
            ):  # TRL's child compares its gradient with the one that grpo's wrote
                cosines[dtype] = run(
                    f"gradient, {dtype}, {engine}",
                    engine=engine,
                    dtype=dtype,
                    case="gradient",
                    gradient=f"{folder}/gradient.pt",
                )
        measured = {engine: [] for engine in ENGINES}
        for repeat in range(repeats):
            for engine in ENGINES:
                first = engine in ("trl", "grpo")  # the rollout is the same program for the others
                result = run(
                    f"{repeat + 1}/{repeats}, {TRL.get(engine, engine)}",
                    engine=engine,
                    repeat=repeat,
                    rollout=first,
                )
                own = measured["trl" if engine in TRL else "grpo"]
                measured[engine].append(
                    result
                    if first or "failed" in result
                    else result
                    | {
                        key: own[repeat][key]
                        for key in ("rollout_s", "lengths", "prompt_tokens")
                        if key in own[repeat]
                    }
                )
        cases = [case for case in sampled["cases"] if case not in ("main", "gradient")]
        grown = {
            case: {
                engine: run(
                    f"{case}, {TRL.get(engine, engine)}", GROWTH_LIMIT, engine=engine, case=case
                )
                for engine in ("trl", *METHODS)
            }
            for case in cases
        }
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")
    }
    report = {
        "model": model.resolve().name,
        "task": task,
        "prompts": prompts,
        "group_size": group_size,
        "max_new_tokens": max_new_tokens,
        "max_pack_tokens": max_pack_tokens,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "sampled": sampled,
        "limit": limit,
        "cosine": cosines,
        "main": measured,
        "growth": grown,
    }
    if output:
        output.write_text(json.dumps(report, indent=1) + "\n")
    lengths, asked = sampled["lengths"], sampled["prompt_lengths"]
    console.print(
        f"\n{report['model']}, {limit['dtype']} on {limit['device']}, {report['cores']} cores; {prompts} "
        f"prompts of {min(asked)} to {max(asked)} tokens x {group_size} completions of {min(lengths)} to "
        f"{max(lengths)} (mean {sum(lengths) / len(lengths):.0f})",
        soft_wrap=True,
    )
    console.print(main_table(measured))
    console.print(
        "* no gradient checkpointing, no logits at prompts. Cosine of grpo's LoRA gradient and TRL's: "
        + ", ".join(
            f"{result.get('failed') or format(result['cosine'], '.6f')} in {dtype}"
            for dtype, result in cosines.items()
        ),
        soft_wrap=True,
    )
    if grown:
        console.print(growth_table(grown))
    console.print(limit_table(measured, limit))


if __name__ == "__main__":
    if sys.argv[1:] == ["child"]:
        print("\n" + json.dumps(child(json.load(sys.stdin))))
    else:
        typer.run(main)
