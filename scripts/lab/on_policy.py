"""Training on a policy's own samples: prompts, samples, their rewards, and the record of the run.

load_prompts()     rows → prompts with their token ids
Sampler            completions of the policy that is trained, as it is now
load_reward()      the notices' oracle or a reward model, as one function of completions
Record             the output directory: run.json, metrics.jsonl, status.json
"""

import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from scripts.lab.policies import check_rewards, rewards_of
from scripts.lab.row_files import EncodedRow, encode_rows, read_examples, summary
from scripts.lab.sampling import ids_that_end, prompt_room
from scripts.lab.scoring import load_reward_models
from shared import NonFinite, UserError
from shared.command import check_arguments, exit_hooks, flag_of
from shared.directory import OutputDirectory
from shared.distributed import Ranks, join_processes, unsharded
from shared.encode import EncodedCompletion, Encoder, completion_text
from shared.export import model_card
from shared.files import storage_errors
from shared.groups import full_attention_length
from shared.loading import load_generator
from shared.model import Policy
from shared.rows import Completion
from shared.sources import source_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reward = Callable[[list[EncodedRow]], Tensor]  # n prompts with K completions each → (n, K), float64

MICRO_BATCH_TOKENS = 8_192  # of a reward model's forward pass
HIDDEN = ("step", "loss", "seconds")  # what a line on the console leaves out
SEQUENCES_AT_ONCE = 512  # that share a cache
LEAST_SHARE = 0.75  # of the sequences must go on, else the others are taken out of the cache


# ---------------------------------------------------------------- prompts and their completions


def load_prompts(source: str, tokenizer: "PreTrainedTokenizerBase", room: int) -> list[EncodedRow]:
    """The prompts of less than `room` tokens. Prints what became of the rows. Raises UserError if no prompt is left."""
    encoder = Encoder(tokenizer)
    rows = list(encode_rows(read_examples(source, encoder.counts), encoder, room))
    tqdm.write(f"{source}: {summary(source, len(rows), encoder.counts)}")
    return rows


class Sampler:
    """Samples from a policy that is trained, by a copy that transformers runs with a cache."""

    def __init__(self, path: str, tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int, ranks: Ranks):
        """The copy has the weights in `path` at first. Raises UserError if nothing ends a completion."""
        self.model = load_generator(path, ranks.dtype, ranks.device)
        self.max_new_tokens = max_new_tokens
        self.eos_ids = ids_that_end(self.model, tokenizer)
        if not self.eos_ids:
            raise UserError(f"model {path}: the tokenizer has no EOS token; set one so that completions can end")

    @property
    def room(self) -> int:
        """One more than the longest prompt that leaves room for a completion. Raises UserError if none does."""
        longest = full_attention_length(self.model.config) - self.max_new_tokens
        return min(prompt_room(self.model, self.max_new_tokens), longest + 1)

    def copy_weights(self, policy: Policy) -> None:
        """Sample from the policy as it is now."""
        weights = {name: unsharded(tensor) for name, tensor in policy.lm.state_dict().items()}
        self.model.load_state_dict(weights)

    def sample(self, prompts: list[EncodedRow], count: int) -> list[EncodedRow]:
        """The prompts, each with `count` completions, which end with an EOS or are cut off.

        The samples depend on the state of torch's global generator.
        """
        sequences = []
        prompts_at_once = max(1, SEQUENCES_AT_ONCE // count)
        for start in range(0, len(prompts), prompts_at_once):
            chunk = [row.prompt for row in prompts[start : start + prompts_at_once]]
            sequences += self._sample(chunk, count)

        rows = []
        for i, row in enumerate(prompts):
            completions = []
            for ids in sequences[i * count : (i + 1) * count]:
                completions.append(EncodedCompletion(ids, [True] * len(ids)))
            rows.append(EncodedRow(row.example, row.prompt, completions))
        return rows

    @torch.inference_mode()
    def _sample(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """Completion k of prompt i is sequence i * count + k. A prompt goes through the model once."""
        tensors = [torch.tensor(ids, device=self.model.device) for ids in prompts]
        ids = pad_sequence(tensors, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(x) for x in tensors], batch_first=True, padding_side="left")
        position_ids = (mask.cumsum(1) - 1).clamp(0)
        output = self.model(ids, attention_mask=mask, position_ids=position_ids, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        cache.batch_repeat_interleave(count)
        mask = mask.repeat_interleave(count, 0)
        logits = output.logits[:, -1].repeat_interleave(count, 0)

        sequences: list[list[int]] = [[] for _ in range(len(mask))]
        running = list(sequences)  # those in the cache
        while True:
            ids = self._next_ids(logits)
            for sequence, token_id in zip(running, ids[:, 0].tolist(), strict=True):
                if not self._has_ended(sequence):
                    sequence.append(token_id)

            going_on = [i for i, sequence in enumerate(running) if not self._has_ended(sequence)]
            if not going_on:
                return sequences
            if len(going_on) < LEAST_SHARE * len(running):
                index = torch.tensor(going_on, device=ids.device)
                cache.batch_select_indices(index)
                mask = mask[index]
                ids = ids[index]
                running = [running[i] for i in going_on]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            position_ids = mask.sum(1, keepdim=True) - 1
            output = self.model(
                ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
            )
            logits = output.logits[:, -1]

    def _next_ids(self, logits: Tensor) -> Tensor:
        probabilities = logits.float().softmax(-1)
        if probabilities.isnan().any():
            raise NonFinite("sampling: the policy's logits are not numbers")
        return torch.multinomial(probabilities, 1)

    def _has_ended(self, sequence: list[int]) -> bool:
        if not sequence:
            return False
        return sequence[-1] in self.eos_ids or len(sequence) == self.max_new_tokens


# ---------------------------------------------------------------- rewards


def load_reward(
    reward: str, tokenizer: "PreTrainedTokenizerBase", prompts: list[EncodedRow], max_new_tokens: int, ranks: Ranks
) -> Reward:
    """r(x, y), of the oracle (`notices`), or of the reward model in a directory less its mean over its own training.

    Raises UserError if the oracle cannot read a prompt, or if the model has another tokenizer than the policy or too
    few positions.
    """
    if reward == "notices":
        check_rewards(reward, [row.example for row in prompts])
        return lambda rows: _oracle_rewards(rows, tokenizer)

    models = load_reward_models([reward], ranks)
    if models.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--reward {reward}: has another tokenizer than the policy")
    longest = max(len(row.prompt) for row in prompts) + max_new_tokens
    if longest > models.room:
        problem = f"reads {models.room} tokens, but a prompt and --max-new-tokens have {longest}"
        raise UserError(f"--reward {reward}: {problem}")

    def model_rewards(rows: list[EncodedRow]) -> Tensor:
        rewards = models.rewards(rows, MICRO_BATCH_TOKENS, normalise=True)
        return torch.tensor(rewards, dtype=torch.double)[:, :, 0]

    return model_rewards


def _oracle_rewards(rows: list[EncodedRow], tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    answered = []
    for row in rows:
        for completion in row.completions:
            text = completion_text(tokenizer, row.prompt, completion.ids)
            answered.append(dataclasses.replace(row.example, completions=[Completion(text)]))
    rewards = rewards_of("notices", answered)
    return torch.tensor(rewards, dtype=torch.double).view(len(rows), -1)


# ---------------------------------------------------------------- the record of a run


class Record:
    """The output directory of a run of one process, with the files that the algorithms' runs have."""

    def __init__(self, args: Any, algorithm: str):
        """Claim the directory. Raises UserError under torchrun, if another run is there, or for a bad argument."""
        self.args = args
        self.algorithm = algorithm
        self.directory = Path(args.output_dir)
        self.step = 0
        self._clock = 0.0
        world_size = os.environ.get("WORLD_SIZE", "1")
        if world_size != "1":
            raise UserError(f"{algorithm}: runs in one process, not in {world_size}; start it without torchrun")
        check_arguments(args)
        self.ranks = join_processes(args.dtype, None)

        self._output = OutputDirectory(self.directory)
        problem = self._output.claim(may_hold_run=False)
        if problem:
            raise UserError(f"--output-dir {self.directory}: {problem.replace('give --resume or', 'give')}")
        exit_hooks.append(self._close)
        self._output.write_status("running", 0, "")

    def _close(self, code: int, reason: str) -> None:
        self._output.write_final_status(code, self.step, reason, is_main=True)

    def start(self) -> None:
        """Write run.json, and start the clock. Raises UserError if the policy would never learn."""
        import transformers

        for name in ("warmup_steps", "value_warmup_steps"):
            if getattr(self.args, name) >= self.args.steps:
                problem = f"must be less than --steps {self.args.steps}"
                raise UserError(f"{flag_of(name)} {getattr(self.args, name)}: {problem}")
        run = {
            "algorithm": self.algorithm,
            "args": dataclasses.asdict(self.args),
            "data": {"train": {"sha256": source_hash(self.args.train_data)}},
            "steps": self.args.steps,
            "processes": 1,
            "device": str(self.ranks.device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        self._output.write("run.json", json.dumps(run, indent=2) + "\n")
        self._clock = time.perf_counter()

    def stop_if_not_finite(self, step: int, losses: Tensor, grad_norm: Tensor) -> None:
        """Call it before the update. Raises NonFinite if a loss or the gradient norm is not a finite number."""
        norm = float(unsharded(grad_norm))
        loss = float(losses.detach().mean())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFinite(f"step {step}: loss {loss}, gradient norm {norm}; the weights were not updated")

    def model_card(self) -> str:
        """The README.md of the trained model: what it is, and how to train it again."""
        return model_card(self.algorithm, dataclasses.asdict(self.args))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Count the step as done, append its line with its seconds to metrics.jsonl, and print it."""
        self.step = step
        now = time.perf_counter()
        line: dict[str, float] = {"step": step, **values, "seconds": now - self._clock}
        self._clock = now
        path = self.directory / "metrics.jsonl"
        with storage_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = " | ".join(f"{name} {value:.4g}" for name, value in line.items() if name not in HIDDEN)
        tqdm.write(f"step {step}/{self.args.steps} | {shown}")
