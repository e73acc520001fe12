"""One command for a GPU, at most 4 minutes: is it exact there, how fast is it, in what memory?

    python tests/gpu_check.py        # prints one table; gpu_check.json grows with each line of it

Needs no network and nothing but requirements.txt, in any version of its ranges. Without a GPU the
same runs on the CPU with small shapes. What fails is said, and the rest goes on.
"""

import contextlib
import importlib.metadata
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
import tokenrl  # noqa: E402
from tokenrl import torch, transformers  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE, STEPS, DECODED = ("cuda", 20, 128) if GPU else ("cpu", 1, 16)
SIZES = ((8, 200), (1, 256), (1, 1024)) if GPU else ((8, 16), (1, 16), (1, 48))  # prompts, tokens
METHODS = ("grpo", "s-grpo", "t-spmo")
TRAIN = f"train svamp --model demo --device {DEVICE} --steps {STEPS} --eval-problems 8 --name run"


def measured(work, *arguments, **options) -> dict:
    """Seconds, and the memory that torch allocated in and reserved of the card meanwhile."""
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start, found = time.perf_counter(), {}
    work(*arguments, **options)
    if GPU:
        torch.cuda.synchronize()
        found["GiB allocated"] = torch.cuda.max_memory_allocated() / 2**30
        found["GiB reserved"] = torch.cuda.max_memory_reserved() / 2**30
    return {"s": time.perf_counter() - start} | found


def errors(dtype: str) -> dict:
    """Root mean square errors of log-probs, and 1 - cosine of LoRA's gradient, against plain passes
    in float32 with the same weights: of tokens as they were drawn, as packed, and of plain passes
    in this dtype, than which ours may not be much worse."""
    model, prompt = tokenrl.load_model("demo", DEVICE, dtype)[0], list(range(20, 40))
    model = tokenrl.add_lora(model, 16, 32, "all-linear", 1 / 3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, and with it the gradient of A
            torch.nn.init.normal_(parameter, std=0.05)
    options = {"max_new_tokens": 24, "ends": set(), "with_stats": True}
    with mock.patch.dict(tokenrl.GRAPHS, {"cuda": 16}):  # two of them
        [completions], _, [drawn] = tokenrl.sample(model, None, [prompt], 8, **options)
    ids = torch.tensor([prompt + completion for completion in completions], device=DEVICE)
    share = torch.tensor([1.0, -1.0] * 4, device=DEVICE).repeat_interleave(24)

    def with_gradient(logps):
        params = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad((share * logps).sum(), params)
        return logps.detach(), torch.cat([slope.flatten().double() for slope in slopes])

    def plain():
        logps = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].float().log_softmax(-1)
        return with_gradient(logps.gather(-1, ids[:, len(prompt) :, None]).flatten())

    trie = tokenrl.Trie(completions)
    packed = tokenrl.packed_logprobs(model, prompt, trie, list(range(len(trie.tokens))))
    found = {"plain": plain(), "packed": with_gradient(packed[sum(trie.paths, [])])}
    model.float()
    truth, slope = plain()
    gap = torch.tensor(sum(drawn, []), device=DEVICE) - truth
    result = {"drawn": gap.square().mean().sqrt().item()}
    for name, (logps, own) in found.items():
        result[name] = (logps - truth).square().mean().sqrt().item()
        result[f"{name} gradient"] = 1 - torch.cosine_similarity(own, slope, dim=0).item()
    for name, error in result.items():
        if not error < 1e-5 + 2 * result["plain gradient" if "gradient" in name else "plain"]:
            raise ArithmeticError(f"{name} is not exact: {result}")
    return result


def torchrun(arguments: list[str]) -> None:
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 1".split()
    command = [sys.executable, *launcher, str(ROOT / "tokenrl.py"), *arguments]
    process = subprocess.Popen(command, stdout=sys.stdout, stderr=sys.stdout)
    try:
        sys.exit(process.wait())
    finally:
        process.terminate()  # when its time is over; torchrun passes it on


def trained(run, *options: str) -> dict:
    """The command line in an empty folder; in this process, where it can, to import things once."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), open("log", "w") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                run([*TRAIN.split(), "--method", *options])
            except SystemExit as end:
                if end.code:
                    raise RuntimeError(Path("log").read_text()[-400:]) from None
        rows = [json.loads(line) for line in open("runs/run/metrics.jsonl")]
    seconds = sorted(row["rollout_s"] + row["update_s"] for row in rows)
    found = {"reward at first": rows[0]["reward"], "at last": rows[-1]["reward"]}
    return found | {"s a step": seconds[len(rows) // 2]}


@cache
def large():
    """Random weights of Qwen2-1.5B's shape, with LoRA on the last third of the layers."""
    config, kind = transformers.AutoConfig.from_pretrained(tokenrl.DATA / "demo"), torch.float32
    if GPU:
        kind = torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
        shape = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
        shape |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}
        config = transformers.Qwen2Config(tie_word_embeddings=True, **shape)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind).eval()
    return tokenrl.add_lora(model, 16, 32, "all-linear", 1 / 3)


def decoded(rows: int) -> dict:
    """Tokens a second of `sample`, of it without graphs and of generate, and what part of the time
    of `sample` the card needs to read the weights once for each position: the least there is."""
    model, prompt = large(), list(range(64))
    source, target = torch.ones(2, 2**26, device=DEVICE)
    ids = torch.tensor([prompt] * rows, device=DEVICE)
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "attention_mask": torch.ones_like(ids)}

    def copied():
        for _ in range(20):
            target.copy_(source)

    def ours(length: int):
        tokenrl.sample(model, None, [prompt], rows, ends=set(), max_new_tokens=length)

    def plain(length: int):
        with mock.patch.dict(tokenrl.GRAPHS, clear=True):
            ours(length)

    @torch.inference_mode()
    def theirs(length: int):
        model.generate(ids, min_new_tokens=length, max_new_tokens=length, **options)

    found, some = {}, DECODED // 4  # of the slow ones
    works = ("sample", ours, DECODED), ("without graphs", plain, some), ("generate", theirs, some)
    for name, work, length in works:
        work(2)  # warms up
        found[name] = rows * length / measured(work, length)["s"]
    speed = 40 * source.nbytes / min(measured(copied)["s"] for _ in range(3))  # read and written
    least = sum(p.nbytes for p in model.parameters()) / speed  # seconds a position
    return found | {"of bandwidth": least * found["sample"] / rows, "GB/s": speed / 1e9}


@cache
def rollout(prompts: int, length: int) -> dict:
    asked, limit = [list(range(i, i + 128)) for i in range(prompts)], {"max_new_tokens": length}
    return measured(tokenrl.sample, large(), None, asked, 8, ends=set(), **limit)


def update(method: str, prompts: int, length: int) -> dict:
    """An update on random completions that share their first 9 tokens in pairs."""
    settings, groups = tokenrl.Settings(method=method), []
    for _ in range(prompts):
        group = torch.randint(300, (8, length))
        group[1::2, :9] = group[::2, :9]
        groups.append(tokenrl.Rollout(None, list(range(128)), group.tolist(), [0.0, 1.0] * 4))
    credited = tokenrl.credit(groups, tokenrl.credit_function(settings), random.Random(0))
    policy, optimizer = tokenrl.Policy(large(), None, "plain"), tokenrl.new_optimizer(large())
    found = measured(tokenrl.update, policy, credited, prompts, optimizer, settings)
    return found | {"whole step, s": found["s"] + rollout(prompts, length)["s"]}


def machine() -> dict:
    names = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    found = {name: importlib.metadata.version(name) for name in [*names, "accelerate"]}
    found |= {"python": sys.version.split()[0], "cores": os.cpu_count(), "cuda": torch.version.cuda}
    return found | {"card": torch.cuda.get_device_name() if GPU else "none"}


def jobs() -> list[tuple]:
    """(part, what, seconds it may take, function that returns {name: number}, its arguments)"""
    found = [("exactness", kind, 15, errors, kind) for kind in ("float32", "float16", "bfloat16")]
    found += [("training", method, 40, trained, tokenrl.main, method) for method in METHODS]
    found.append(("training", "float16", 40, trained, tokenrl.main, "grpo", "--dtype", "float16"))
    found.append(("training", "nccl" if GPU else "gloo", 40, trained, torchrun, "grpo"))
    found += [("tokens/s", f"{rows} rows", 30, decoded, rows) for rows in (8, 64)]
    for size in SIZES:
        what = "{} x 8 x {}, ".format(*size)
        found.append(("step", what + "rollout", 60, rollout, *size))
        found += [("step", what + method, 30, update, method, *size) for method in METHODS]
    return found


def main(output: Path) -> None:
    def late(*_):
        raise TimeoutError("the time is over")

    began, report, failed = time.monotonic(), {"machine": machine()}, 0
    alarm = getattr(signal, "alarm", lambda seconds: None)  # not on Windows
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, late)
    told = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    table, console = Table("part", "what", "found", caption=told), Console(width=110, markup=False)
    for part, what, seconds, work, *arguments in jobs():
        left = 230 - int(time.monotonic() - began)
        console.print(f"{left:4} s left  {part}: {what}", highlight=False)
        try:
            alarm(min(seconds, left) if left > 0 else late())
            found = work(*arguments)
            text = ", ".join(f"{key} {value:.3g}" for key, value in found.items())
        except Exception as error:
            text = f"FAILED: {type(error).__name__}: {str(error).strip()[:400]}"
            found, failed = {"failed": text}, failed + 1
        finally:
            alarm(0)
        report.setdefault(part, {})[what] = found
        table.add_row(part, what, text)
        output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table, f"{failed} failed. Written: {output}", sep="\n", highlight=False)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "gpu_check.json").resolve())
