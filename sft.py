"""Supervised training on JSONL of {"prompt", "completion"}: pretrains the tiny base, and fine-tunes any checkpoint.

One loss for all of them: cross-entropy on the completion's tokens, EOS included, averaged over the batch's tokens;
prompts are read but never trained. Rows are not packed into one another: a row is one document, micro-batches
hold rows of like length, so that little is padding and no document sees another.

    python sft.py --from-scratch tiny --optimizer muon --learning-rate 3e-3 --out runs/tiny-base  # the tiny base
    python sft.py --data traces.jsonl --model models/tiny-base --out runs/sft                     # fine-tuning

You see the training loss fall and, every --eval-every steps, the loss on rows that were kept out.
"""

import machinery  # noqa: F401, I001  (first: from here on Ctrl-C ends in one line)
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from corpus import build_tokenizer, check_vocabulary
from countdown import check_style, fill_template
from machinery.batching import micro_batches, pad_batch, teacher_kl, token_logprobs
from machinery.checkpoints import DTYPES, check_device, check_dtype, check_finite, end_tokens, generate_ends, load
from machinery.data import check_rows, check_unchanged, fingerprint, keep_out, read_jsonl
from machinery.flags import (StopRequest, bad_input_exits, broken_weights_exit, check_positive, disk_full_exits, fail,
                             parse_config)
from machinery.notes import check_learning_rate
from machinery.optimizer import MasterAdamW, Muon, clip_gradients
from machinery.run_folder import (append_jsonl, check_free, create_run, load_checkpoint, rewind_log, save_checkpoint,
                                  what_to_do)
from machinery.text import (check_examples, check_style_fits, continue_prompt, encode_completions, encode_prompts,
                            end_of_text, end_of_turn, prompt_key)
from model import Model, init_weights, set_context


@dataclass(frozen=True)
class Config:
    # the algorithm
    data: str = "data/corpus.jsonl"      # JSONL, one {"prompt", "completion"} or {"messages"} a line
    model: str = "models/tiny-base"      # checkpoint directory or hub id to start from
    from_scratch: str = ""               # random weights instead: tiny (0.8M parameters), student or llama-student (0.2M)
    context: int = 0                     # room for tokens, 0: as its config says (from scratch: 2,048)
    teacher: str = ""                    # learn this checkpoint's distribution over the rows' tokens, not the tokens
    epochs: int = 1                      # passes over the data
    steps: int = 0                       # optimizer steps, whatever passes they take; 0: those of --epochs
    batch_tokens: int = 8192             # prompt and completion tokens per optimizer step
    style: str = "tiny"                  # template that a row's prompt is put into: tiny (as it is), base or chat
    optimizer: str = "adamw"             # adamw, or muon for matrices, adamw for the rest (1.7x quicker from scratch)
    learning_rate: float = 5e-5          # AdamW peak; DeepSeek-R1's SFT decays 5e-5 to 5e-6
    muon_learning_rate: float = 0.02     # Muon peak, for 2-D weights that are no embeddings
    final_lr: float = 0.1                # the cosine ends at this share of the peak
    warmup: float = 0.02                 # share of the steps with rising learning rate
    weight_decay: float = 0.0            # decoupled, all optimizers
    clip_norm: float = 1.0               # gradient norm limit
    eval_rows: int = 512                 # rows kept out of training for the held-out loss
    seed: int = 0                        # weights from scratch, split and order of the data

    # the machine and the run folder
    out: str = "runs/sft"                # run folder to create
    resume: str = ""                     # continue this run folder; its own config.json holds, other flags are refused
    eval_every: int = 500                # steps between held-out losses
    save_every: int = 500                # steps between checkpoints
    micro_batch_tokens: int = 2048       # tokens per forward pass, padding included; memory and speed, never the loss
    dtype: str = "float32"               # what the model computes in: float32, or bfloat16 with fp32 master weights
    activation_checkpointing: bool = False  # keep a block's input only, compute the rest again in the backward pass
    offload_optimizer: bool = False      # master weights and AdamW's moments in host memory
    device: str = "cpu"                  # cpu or cuda

    def __post_init__(self):
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"got optimizer {self.optimizer!r}, expected adamw or muon")
        check_dtype(self.dtype)
        check_style(self.style)
        if self.optimizer == "muon" and (self.dtype != "float32" or self.offload_optimizer):
            raise ValueError("got optimizer muon with --dtype bfloat16 or --offload-optimizer, expected fp32 on the "
                             "device; use --optimizer adamw")
        if self.from_scratch not in ("", *TINY_MODELS):
            raise ValueError(f"got from_scratch {self.from_scratch!r}, expected one of {', '.join(TINY_MODELS)}")
        if min(self.learning_rate, self.muon_learning_rate) <= 0 or not 0 <= min(self.warmup, self.final_lr) <= 1:
            raise ValueError("expected learning rates above 0, and warmup and final_lr within [0, 1]")
        if min(self.context, self.steps) < 0:
            raise ValueError(f"got context {self.context} and steps {self.steps}, expected at least 0")
        check_positive(self, "eval_rows", "epochs", "batch_tokens", "micro_batch_tokens", "eval_every", "save_every",
                       "clip_norm")


def shape(width: int) -> dict:
    return dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, head_dim=width // 4)


TINY_MODELS = {"tiny": shape(128), "student": shape(64), "llama-student": shape(64)}  # that --from-scratch knows


def new_model(name: str, seed: int):
    """Random weights of a Qwen3 or Llama config over the corpus's words -> (model, tokenizer). The Llama has a tokenizer
    of its own, digit by digit: what passes between the two families is text, as in DeepSeek-R1's distillation."""
    from transformers import LlamaConfig, Qwen3Config

    llama = name.startswith("llama")
    tokenizer = build_tokenizer(digits=llama)
    family, architecture = (LlamaConfig, "LlamaForCausalLM") if llama else (Qwen3Config, "Qwen3ForCausalLM")
    hf_config = family(vocab_size=len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=True,
                       architectures=[architecture], dtype="float32", bos_token_id=None,
                       rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **TINY_MODELS[name])
    model = Model(hf_config)
    init_weights(model, seed)
    return model, tokenizer


def tokenize(rows: list[dict], tokenizer, path: str, style: str = "tiny",
             eos_ids: set[int] = frozenset()) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids with EOS) a row; prompts are questions, which the style's template takes, or
    conversations, which the chat template takes. eos_ids: where generate() stops; a reply of a chat ends as its template
    ends it, if that is one of them. Raises ValueError with the row where a field is missing or the template refuses it."""
    rows = check_rows(rows, path, ("prompt", "completion"), "both")
    styles = ["chat" if isinstance(row["prompt"], list) else style for row in rows]
    ends = {name: (end_of_turn if name == "chat" else end_of_text)(tokenizer, eos_ids) for name in set(styles)}
    texts, examples = [], []
    for start in tqdm(range(0, len(rows), 4096), desc=f"reading {path}", delay=2, leave=False):
        chunk, own = rows[start:start + 4096], styles[start:start + 4096]
        prompts = []
        for number, row in enumerate(chunk, start + 1):
            try:
                prompts.append(fill_template(row["prompt"], style, tokenizer))
            except ValueError as error:
                raise ValueError(f"got {path}, row {number}: {error}") from None
        completions = [continue_prompt(prompt, row["completion"]) for prompt, row in zip(prompts, chunk)]
        texts += zip(prompts, completions)
        ids = zip(encode_prompts(tokenizer, prompts, own), encode_completions(tokenizer, completions))
        examples += [(prompt, completion if completion[-1:] == [ends[name]] else [*completion, ends[name]])
                     for (prompt, completion), name in zip(ids, own)]
    check_examples(tokenizer, texts, examples, path)
    return examples


def check_same_tokenizer(tokenizer, teacher_tokenizer, config: Config) -> None:
    """Raises ValueError where a token id does not mean the same to both: then distributions cannot be compared.

    That is a reason to distil by text, as DeepSeek-R1 does into Qwen and Llama: text needs no common tokenizer."""
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        differ = sum(ours.get(token) != theirs.get(token) for token in ours.keys() | theirs.keys())
        raise ValueError(f"got teacher {config.teacher} with another tokenizer than {config.model} ({len(theirs):,} "
                         f"and {len(ours):,} tokens, {differ:,} of them different), expected the same: a distribution over "
                         "tokens only compares token by token; distil by text instead, without a teacher's logits")


def epoch_batches(examples, batch_tokens: int, seed: int) -> list[list[int]]:
    """The steps of one epoch: shuffled rows, cut where a step has batch_tokens: a fair draw of all kinds of rows."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    batches, batch, tokens = [], [], 0
    for index in order:
        batch.append(index)
        tokens += len(examples[index][0]) + len(examples[index][1])
        if tokens >= batch_tokens:
            batches.append(batch)
            batch, tokens = [], 0
    return batches + [batch] if batch else batches


def all_batches(examples, config: Config) -> list[list[int]]:
    """Those of --epochs, or of as many epochs as --steps takes."""
    batches, epoch = [], 0
    while epoch < config.epochs and not config.steps or len(batches) < config.steps:
        batches += epoch_batches(examples, config.batch_tokens, config.seed + epoch)
        epoch += 1
    return batches[:config.steps or None]


def build_optimizers(model, config: Config) -> list:
    """[AdamW], or [Muon for the matrices, AdamW for the rest]."""
    adamw = dict(lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return [MasterAdamW(model.parameters(), offload=config.offload_optimizer, **adamw)]
    matrices = [p for name, p in model.named_parameters()
                if p.dim() == 2 and "embed" not in name and "lm_head" not in name]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay),
            MasterAdamW(rest, **adamw)]


def schedule(step: int, steps: int, config: Config) -> float:
    """Share of the peak learning rate at this step: linear warm-up, then a cosine down to final_lr."""
    warmup_steps = max(1, round(config.warmup * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def completion_losses(model, examples, config: Config, teacher=None):
    """Yields (sum of the losses of the completion tokens in nats, their number) for one micro-batch after the other.

    A token's loss is -log p; with a teacher KL(teacher || model) over the whole vocabulary at its place."""
    lengths = [len(prompt) + len(completion) for prompt, completion in examples]
    for micro_batch in micro_batches(lengths, config.micro_batch_tokens):
        prompts, completions = zip(*(examples[i] for i in micro_batch))
        input_ids, mask = pad_batch(prompts, completions, device=config.device)  # (B, T), (B, T-1)
        if teacher:
            losses = teacher_kl(model, teacher, input_ids, mask)  # (B, T-1)
        else:
            losses = -token_logprobs(model, input_ids, mask)[0]  # (B, T-1)
        yield losses.sum(), int(mask.sum())


@torch.no_grad()
def held_out_loss(model, examples, config: Config, teacher=None) -> float:
    """Nats per completion token on rows that were never trained on."""
    losses = [(loss.item(), tokens) for loss, tokens in completion_losses(model, examples, config, teacher)]
    check_finite([loss for loss, _ in losses], model.source, "held-out losses")
    return sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)


def optimizer_step(optimizers: list, share_of_peak: float, config: Config) -> float:
    """-> the gradients' norm before clipping; where it is not finite, no step is taken."""
    gradients = [p.grad for muon in optimizers[:-1] for p in muon.param_groups[0]["params"]]
    gradients += optimizers[-1].gradients()
    norm = clip_gradients(gradients, config.clip_norm)
    if not math.isfinite(norm):
        return norm
    for muon in optimizers[:-1]:
        muon.param_groups[0]["lr"] = config.muon_learning_rate * share_of_peak
    optimizers[-1].set_learning_rate(config.learning_rate * share_of_peak)
    for optimizer in optimizers:
        optimizer.step()
    return norm


def start(config: Config):
    """-> (run folder, model, tokenizer, teacher or None, examples, held-out examples, trainer state of a resumed run).
    Everything that can be wrong with the input is said here, before anything is written."""
    with bad_input_exits():
        check_device(config.device)
        if not config.resume:
            check_free(config.out)
        state, teacher, dtype = None, None, DTYPES[config.dtype]
        if config.resume:
            model, tokenizer, state = load_checkpoint(config.resume, dtype=dtype)
            check_unchanged(state, config.resume)
        elif config.from_scratch:
            model, tokenizer = new_model(config.from_scratch, config.seed)
        else:
            model, tokenizer = load(config.model, dtype=dtype)
        if config.context:
            set_context(model, config.context)
        model.to(config.device).activation_checkpointing = config.activation_checkpointing
        if config.teacher:
            teacher, teacher_tokenizer = load(config.teacher, dtype=dtype, device=config.device)
            check_same_tokenizer(tokenizer, teacher_tokenizer, config)
        rows = check_rows(read_jsonl(config.data), config.data, ("prompt", "completion"), "both")
        examples = tokenize(rows, tokenizer, config.data, config.style, generate_ends(model))
        check_vocabulary(tokenizer, any(tokenizer.unk_token_id in row for pair in examples for row in pair), model.source)
        lengths = [len(prompt) + len(completion) for prompt, completion in examples]
        longest = max(lengths, default=0)
        if not all(prompt for prompt, _ in examples):
            raise ValueError(f"got {config.data}, row {[not prompt for prompt, _ in examples].index(True) + 1}, with a prompt "
                             "of no token, expected at least one to go on from")
        if longest > (context := min(m.config.context for m in (model, teacher) if m)):
            raise ValueError(f"got a row of {longest} tokens in {config.data}, row {lengths.index(longest) + 1}, more than "
                             f"the model's context of {context}; leave it out, or make room with --context")
        keys = [prompt_key(row["prompt"], config.style, tokenizer) for row in rows]
        held_out, examples = keep_out(keys, examples, config.eval_rows, config.seed)
        if not examples or not held_out:
            raise ValueError(f"got {len(rows)} rows of {len(set(keys))} different prompts in {config.data}, of which "
                             f"--eval-rows {config.eval_rows} are kept out; expected at least one on each side, and all "
                             "rows of a prompt on the same one")
        check_style_fits(model, tokenizer, config.style, end_tokens(model, tokenizer))
        check_learning_rate(model, config.learning_rate, 2e-4)
        run = Path(config.resume) if config.resume else create_run(config.out, config)
        if state:
            rewind_log(run / "metrics.jsonl", state["step"])
    print(f"{config}\n{sum(p.numel() for p in model.parameters()):,} parameters, {len(examples):,} rows, "
          f"{len(held_out)} held out")
    return run, model, tokenizer, teacher, examples, held_out, state


@broken_weights_exit()
@disk_full_exits("make room; the last checkpoint is whole, go on with --resume RUN")
def main() -> None:
    config = parse_config(Config, __doc__)
    run, model, tokenizer, teacher, examples, held_out, state = start(config)
    batches = all_batches(examples, config)
    optimizers = build_optimizers(model, config)
    step, inputs = 0, (state or {}).get("inputs")  # of a resumed run they are as they were: check_unchanged
    inputs = inputs or {path: fingerprint(path) for path in (config.data, config.teacher) if path}
    if state:
        step = state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    if step >= len(batches):
        return print(f"nothing to do: {run} has finished all of its {step} steps; the model is in {run / 'checkpoint'}")

    def save() -> None:
        save_checkpoint(run, model, tokenizer, {"step": step, "inputs": inputs,
                                                "optimizers": [o.state_dict() for o in optimizers]})

    stop, started, tokens_seen, steps_before = StopRequest(), time.time(), 0, step
    bar = tqdm(batches[step:], initial=step, total=len(batches), desc="sft", mininterval=1.0)
    for batch in bar:
        # 1. forward and backward over micro-batches: the loss is the mean over the step's completion tokens
        rows = [examples[i] for i in batch]
        tokens, total = sum(len(completion) for _, completion in rows), 0.0
        for loss, _ in completion_losses(model, rows, config, teacher):
            (loss / tokens).backward()  # the step's tokens, not the micro-batch's: the cut changes nothing
            total += loss.item()

        # 2. one optimizer step
        share_of_peak = schedule(step, len(batches), config)
        norm = optimizer_step(optimizers, share_of_peak, config)
        if not math.isfinite(norm):
            if math.isfinite(total) and step:  # else the weights are broken, and the last checkpoint is the good one
                save()
            names = f" or its teacher {config.teacher}" * bool(teacher)
            fail(f"got a loss of {total / tokens:g} and a gradient norm of {norm:g} at step {step + 1} from "
                 f"{model.source}{names}, expected finite ones{what_to_do(run, step, config.model)}")
        model.zero_grad()
        step, tokens_seen = step + 1, tokens_seen + tokens
        model.source = f"the model of {run} after step {step}"

        # 3. log, evaluate, save
        if step == steps_before + 1:
            minutes = (time.time() - started) * (len(batches) - steps_before) / 60
            tqdm.write(f"by the first step: about {minutes:.0f} minutes for {len(batches) - steps_before} steps here")
        if step % 50 == 0:
            bar.set_postfix(loss=f"{total / tokens:.4f}", tokens_per_s=f"{tokens_seen / (time.time() - started):,.0f}")
        row = {"step": step, "loss": total / tokens, "tokens": tokens, "gradient_norm": norm, "lr_share": share_of_peak}
        if step % config.eval_every == 0 or step == len(batches):
            row["held_out_loss"] = held_out_loss(model, held_out, config, teacher)
            tqdm.write(f"step {step}: held-out loss {row['held_out_loss']:.4f} nats a token")
        append_jsonl(run / "metrics.jsonl", row)
        if step % config.save_every == 0 or step == len(batches) or stop.requested:
            save()
        if stop.requested and step < len(batches):
            print(f"stopped after step {step}; continue with: python sft.py --resume {run}")
            raise SystemExit(130)
    print(f"held-out loss {row['held_out_loss']:.4f} nats a token after {step} steps, "
          f"{(time.time() - started) / 60:.1f} minutes; the model is in {run / 'checkpoint'}")


if __name__ == "__main__":
    main()
