"""A chat model from sft to dpo by the command lines: it is trained on what it drew, and stops where its turns end.

As in Llama 3, the EOS of its tokenizer is not what ends a turn.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import harness
import pytest
import tiny
import torch
from tokenised import pieces
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.batches import Batches
from shared.distributed import single_process
from shared.groups import Groups, Requires, load_groups
from shared.loading import load_policy_from

HUGE = 1 << 20  # tokens of a pass that holds all rows
NEW_TOKENS = 16
COMPLETIONS = 3
TOPICS = 8  # questions, each with one answer
QUESTIONS = tiny.words()[:TOPICS]
ANSWERS = tiny.words()[20 : 20 + TOPICS]
BATCH = 16
TRAINING = {"batch_size": BATCH, "lr_schedule": "constant", "log_every": 1}


def conversation(rng: random.Random, turns: int) -> list[dict]:
    """Questions of the user and the right answers."""
    messages = []
    for topic in rng.sample(range(TOPICS), turns):
        messages.append({"role": "user", "content": QUESTIONS[topic]})
        messages.append({"role": "assistant", "content": ANSWERS[topic]})
    return messages


def make_pair(rng: random.Random) -> dict:
    """A right and a wrong answer, each perhaps with another question and its right answer behind it."""
    *prompt, right = conversation(rng, rng.randint(1, 3))
    others = [answer for answer in ANSWERS if answer != right["content"]]
    wrong = {"role": "assistant", "content": rng.choice(others)}
    return {
        "prompt": prompt,
        "chosen": [right, *conversation(rng, rng.randint(0, 1))],
        "rejected": [wrong, *conversation(rng, rng.randint(0, 1))],
    }


@dataclass
class Pipeline:
    """What the command lines have left."""

    sft: Path
    dpo: Path
    scored: Path
    tokenizer: Any
    turn_end: int


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """sft on all turns, samples of it, rm on pairs, scores of the samples, dpo on them."""
    folder = tmp_path_factory.mktemp("pipeline")
    rng = random.Random(0)
    chats = [{"messages": conversation(rng, rng.randint(1, 3))} for _ in range(96)]
    prompts = [{"prompt": conversation(rng, rng.randint(1, 3))[:-1]} for _ in range(48)]
    pairs = [make_pair(rng) for _ in range(64)]
    for name, rows in {"chats": chats, "prompts": prompts, "pairs": pairs}.items():
        tiny.write_jsonl(folder / f"{name}.jsonl", rows)

    tokenizer = tiny.make_tokenizer(chat=True)
    tokenizer.eos_token = tiny.EOS
    base = tiny.make_model(folder / "base", chat=True, eos_token_id=tokenizer.eos_token_id, initializer_range=0.1)
    tokenizer.save_pretrained(base)

    sft = folder / "sft"
    settings = {"model": base, "train_data": folder / "chats.jsonl", "turns": "all", **TRAINING}
    harness.run(sft, script="algos/sft.py", max_steps=24, learning_rate=1e-2, **settings)
    samples = folder / "samples.jsonl"
    settings = {"model": sft, "rows": folder / "prompts.jsonl", "num_completions": COMPLETIONS}
    settings |= {"max_new_tokens": NEW_TOKENS, "temperature": 1.2}
    harness.run(samples, script="scripts/sample.py", flag="output", **settings)

    settings = {"model": sft, "train_data": folder / "pairs.jsonl", **TRAINING}
    harness.run(folder / "rm", script="algos/rm.py", max_steps=50, learning_rate=3e-3, **settings)
    scored = folder / "scored.jsonl"
    settings = {"rows": samples, "reward_models": folder / "rm"}
    harness.run(scored, script="scripts/score.py", flag="output", **settings)

    dpo = folder / "dpo"
    settings = {"model": sft, "train_data": scored, **TRAINING}
    harness.run(dpo, script="algos/dpo.py", max_steps=10, learning_rate=1e-3, shuffle=False, **settings)
    turn_end = tokenizer.convert_tokens_to_ids(tiny.TURN_END)
    return Pipeline(sft, dpo, scored, tokenizer, turn_end)


def prompt_ids(pipeline: Pipeline, row: dict) -> list[int]:
    """A prompt as plain transformers encodes it."""
    return pipeline.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)


def load_scored(pipeline: Pipeline) -> Groups:
    """The scored samples as training loads them."""
    tokenizer = AutoTokenizer.from_pretrained(pipeline.sft)
    return load_groups(str(pipeline.scored), tokenizer, Requires("ranking"), 512, None)


def drawn_groups(pipeline: Pipeline, groups: Groups) -> list[tuple[list[int], list[list[int]]]]:
    """For each group the ids of its prompt, and those that were drawn, from the highest score to the lowest."""
    rows = tiny.read_jsonl(pipeline.scored)
    drawn = []
    for number in groups.row_numbers.tolist():
        row = rows[number - 1]
        order = sorted(range(COMPLETIONS), key=lambda k: -row["scores"][k])
        drawn.append((prompt_ids(pipeline, row), [row["completion_ids"][k] for k in order]))
    return drawn


def test_samples_are_trained_on_as_they_were_drawn(pipeline: Pipeline) -> None:
    """The ids of each completion, also where those of its text are others."""
    groups = load_scored(pipeline)
    drawn = drawn_groups(pipeline, groups)
    assert len(drawn) >= BATCH
    for i, (prompt, completions) in enumerate(drawn):
        assert pieces(groups, i) == [prompt, *completions]
    assert groups.report["drawn ids other than those of their text"] > 0


def test_log_probabilities_are_those_of_generation(pipeline: Pipeline) -> None:
    """log π(y|x) by packed rows, and by dpo's first step, is the sum that `generate` reports of the same tokens."""
    groups = load_scored(pipeline)
    with single_process("float32") as ranks, torch.no_grad():
        policy = load_policy_from(str(pipeline.sft), ranks)
        (batch,) = Batches(groups, len(groups), HUGE, None, ranks).of_step(1)
        in_training = policy.logps(batch).tolist()

    model = AutoModelForCausalLM.from_pretrained(pipeline.sft, dtype=torch.float32)
    in_generation = []
    for prompt, completions in drawn_groups(pipeline, groups)[:BATCH]:
        in_generation.append(generated_logps(model, prompt, completions))
    for ours, theirs in zip(in_training[:BATCH], in_generation, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)

    first_line = tiny.training_lines(pipeline.dpo / "metrics.jsonl")[0]
    chosen = fmean(logps[0] for logps in in_generation)
    assert first_line["logps/chosen"] == pytest.approx(chosen, abs=1e-4)


def generated_logps(model: Any, prompt: list[int], completions: list[list[int]]) -> list[float]:
    """log π of completions by the logits of `generate`, which must choose their tokens."""
    padding = [model.config.pad_token_id] * NEW_TOKENS

    def next_token(k: int, ids_so_far: Tensor) -> list[int]:
        step = len(ids_so_far) - len(prompt)
        return [(completions[k] + padding)[step]]

    output = model.generate(
        torch.tensor([prompt] * len(completions)),
        do_sample=False,
        max_new_tokens=max(map(len, completions)),
        prefix_allowed_tokens_fn=next_token,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logps = torch.stack(output.logits, 1).log_softmax(-1)
    sums = []
    for k, ids in enumerate(completions):
        assert output.sequences[k, len(prompt) :][: len(ids)].tolist() == ids
        sums.append(float(logps[k, range(len(ids)), ids].sum()))
    return sums


def test_the_reward_model_scores_right_answers_higher(pipeline: Pipeline) -> None:
    """It was trained on answers in completions of one and two turns."""
    answers = dict(zip(QUESTIONS, ANSWERS, strict=True))
    scores_of: dict[bool, list[float]] = {True: [], False: []}  # of right answers, of wrong ones
    for row in tiny.read_jsonl(pipeline.scored):
        answer = answers[row["prompt"][-1]["content"]]
        for text, score in zip(row["completions"], row["scores"], strict=True):
            scores_of[text == answer].append(score)
    assert fmean(scores_of[True]) > fmean(scores_of[False]) + 1


def test_the_trained_model_stops_at_the_end_of_its_turn(pipeline: Pipeline) -> None:
    """In plain transformers, with the generation config that it was saved with; after the answer it has learnt."""
    model = AutoModelForCausalLM.from_pretrained(pipeline.dpo, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pipeline.dpo)
    num_right = 0
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        prompt = prompt_ids(pipeline, {"prompt": [{"role": "user", "content": question}]})
        output = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        ids = output[0, len(prompt) :].tolist()
        assert len(ids) < NEW_TOKENS
        assert ids.index(pipeline.turn_end) == len(ids) - 1
        num_right += tokenizer.decode(ids, skip_special_tokens=True) == answer
    assert num_right >= TOPICS / 2
