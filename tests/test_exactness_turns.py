"""The command lines against a float64 loop where completions have several turns, and where a text's ids depend on what
stands before it; several processes and micro-batches over such rows.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import chatml
import families
import harness
import pytest
import reference
import tiny
import torch
from exactness import check_agreement, compare_metrics, compare_run, train_reference
from settings import BATCH, BETA, OPTIONS, PREFERENCE_METRICS, REWARD_METRICS, STEPS, TOKEN_METRICS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

ROWS = STEPS * BATCH
CUT = {"max_length": 80, "max_prompt_length": 40}  # cuts prompts, and some completions where a user speaks
HUGE = 1 << 20  # tokens of a pass that holds every batch
SMALL = 200
GAMMAS = {"gamma_start": 0.02, "gamma_end": 0.3}


def of_two_reward_models(row: dict) -> dict:
    """A pair with a second score for each completion."""
    columns = dict(row)
    chosen = columns.pop("score_chosen")
    rejected = columns.pop("score_rejected")
    return {**columns, "scores": [[chosen, rejected], [rejected, 2 * chosen]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats in every form, and a tiny Llama with a chat template."""
    path = tmp_path_factory.mktemp("turns")
    pairs = chatml.make_chats(ROWS, seed=1)
    sampled = chatml.make_chats(ROWS, seed=2, samples=2)
    answers = chatml.make_chats(ROWS, seed=3, k=1)
    rows = {
        "answers": answers,
        "conversations": [{"messages": row["prompt"] + row["completion"]} for row in answers],
        "pairs": pairs,
        "sampled": sampled,
        "ensemble": [of_two_reward_models(row) for row in sampled],
        "fours": chatml.make_chats(ROWS, seed=4, k=4),
    }
    for name, rows_of_form in rows.items():
        tiny.write_jsonl(path / f"{name}.jsonl", rows_of_form)
    tiny.make_model(path / "model", "llama", seed=3, chat=True, num_key_value_heads=2)
    tiny.make_reward_model(path / "reward_model", chat=True)
    return path


# ---------------------------------------------------------------- several turns


def test_the_chats_have_what_is_tested(folder: Path) -> None:
    """Context inside completions, turns from which nothing is learnt, and completions that end in context when cut."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = tiny.read_jsonl(folder / "pairs.jsonl")
    ends = set()  # the number of turns that are learnt from, in each completion
    num_cut_in_context = 0
    num_tokens = 0
    for row in rows:
        whole = chatml.encode(tokenizer, row)
        cut = chatml.encode(tokenizer, row, **CUT)
        assert len(whole.prompt) <= OPTIONS["max_prompt_length"]
        assert whole.size <= OPTIONS["max_length"]
        num_tokens += whole.size
        for ids, is_counted, shorter in zip(whole.completions, whole.is_counted, cut.completions, strict=True):
            counted = [token for token, counts in zip(ids, is_counted, strict=True) if counts]
            ends.add(counted.count(tokenizer.eos_token_id))
            num_cut_in_context += len(shorter) < min(len(ids), CUT["max_length"] - len(cut.prompt))
    assert ends == {1, 2, 3}
    assert num_cut_in_context > 1
    assert num_tokens > 5 * SMALL


PAIR_RUNS: dict[str, tuple[str, str, reference.Loss, dict[str, Any]]] = {
    "dpo": ("dpo", "pairs", reference.dpo(BETA), {"beta": BETA}),
    "dpo, K = 4": ("dpo", "fours", reference.dpo(BETA), {"beta": BETA}),
    "ipo": ("ipo", "pairs", reference.ipo(0.2), {"tau": 0.2}),
    "exo": ("exo", "pairs", reference.exo(BETA, 0.02), {"beta": BETA, "epsilon": 0.02}),
    "exo, K = 4": ("exo", "fours", reference.exo(BETA, 0.0, 0.7), {"beta": BETA, "beta_r": 0.7}),
    "typo": ("typo", "sampled", reference.typo(0.3), {"lam": 0.3}),
    "typo per token": ("typo", "sampled", reference.typo(0.3, True), {"lam": 0.3, "length_normalise": True}),
    "distill_dpo": ("distill_dpo", "pairs", reference.distill_dpo(BETA), {"beta": BETA}),
    "pessimistic_dpo": (
        "pessimistic_dpo",
        "pairs",
        reference.pessimistic_dpo(BETA, "dpo", STEPS, *GAMMAS.values()),
        {"beta": BETA, "base": "dpo", **GAMMAS},
    ),
    "pessimistic_dpo with samples": (
        "pessimistic_dpo",
        "sampled",
        reference.pessimistic_dpo(BETA, "distill", STEPS, *GAMMAS.values()),
        {"beta": BETA, "base": "distill", **GAMMAS},
    ),
    "ensemble_dpo": (
        "ensemble_dpo",
        "ensemble",
        reference.ensemble_dpo(BETA, STEPS, *GAMMAS.values()),
        {"beta": BETA, **GAMMAS},
    ),
}


@pytest.mark.parametrize("name", PAIR_RUNS)
def test_preferences(folder: Path, tmp_path: Path, name: str) -> None:
    """K = 2 completions of several turns, or K = 4 of one turn after several in the prompt."""
    algorithm, data, loss, options = PAIR_RUNS[name]
    compare_run(
        f"algos/{algorithm}.py",
        tmp_path / "out",
        folder / "model",
        folder / f"{data}.jsonl",
        loss,
        encode=chatml.encode,
        **options,
    )


FAMILIES = ("mistral", "qwen3_moe", "gemma3")  # rows of several windows, experts, the text part of a multimodal model


def pairs_of_runs_and_families() -> Iterator[Any]:
    """Every run with each family; a third of them when the slow tests do not run."""
    for i, name in enumerate(PAIR_RUNS):
        for j, family in enumerate(FAMILIES):
            marks = pytest.mark.slow if i % len(FAMILIES) != j else ()
            yield pytest.param(name, family, marks=marks)


@pytest.mark.parametrize("name, family", pairs_of_runs_and_families())
def test_preferences_of_other_families(folder: Path, tmp_path: Path, name: str, family: str) -> None:
    model = families.save_model(family, tmp_path / "model", scale=10)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.save_pretrained(model)
    algorithm, data, loss, options = PAIR_RUNS[name]
    path = folder / f"{data}.jsonl"
    groups = [chatml.encode(tokenizer, row) for row in tiny.read_jsonl(path)]
    longest = max(len(group.prompt + ids) for group in groups for ids in group.completions)
    assert longest > 3 * families.WINDOW
    script = f"algos/{algorithm}.py"
    compare_run(script, tmp_path / "out", model, path, loss, encode=chatml.encode, **options)


def test_token_dpo_beam(folder: Path, tmp_path: Path) -> None:
    """The means of token rewards are over tokens that count."""
    metrics = (*PREFERENCE_METRICS, *TOKEN_METRICS)
    data = folder / "pairs.jsonl"
    loss = reference.token_dpo(BETA)
    options = {"encode": chatml.encode, "beta": BETA}
    compare_run("algos/token_dpo_beam.py", tmp_path / "out", folder / "model", data, loss, metrics, **options)


@pytest.mark.parametrize(
    "turns, data, encode",
    [
        ("last", "answers", chatml.encode),
        ("all", "answers", chatml.encode_all_turns),
        ("all", "conversations", chatml.encode_all_turns),
    ],
)
def test_sft(folder: Path, tmp_path: Path, turns: str, data: str, encode: reference.Encode) -> None:
    """The turns of the completion, or also those of the prompt."""
    compare_run(
        "algos/sft.py",
        tmp_path / "out",
        folder / "model",
        folder / f"{data}.jsonl",
        reference.sft(),
        metrics=(),
        encode=encode,
        turns=turns,
    )


@pytest.mark.parametrize("data, limits", [("pairs", {}), ("fours", {}), ("pairs", CUT)])
def test_rm(folder: Path, tmp_path: Path, data: str, limits: dict[str, int]) -> None:
    """The reward is read at the last token that counts, with all context before it; also where a completion is cut."""
    encode = partial(chatml.encode, **limits)
    model = folder / "reward_model"
    output_dir = tmp_path / "out"
    path = folder / f"{data}.jsonl"
    rows = tiny.read_jsonl(path)
    harness.run(output_dir, script="algos/rm.py", model=model, train_data=path, **{**OPTIONS, **limits})
    lines = tiny.training_lines(output_dir / "metrics.jsonl")
    expected, trained = train_reference(model, rows, reference.rm(), rewards=True, encode_row=encode)
    compare_metrics(lines, expected, REWARD_METRICS)

    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    saved = AutoModelForSequenceClassification.from_pretrained(output_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        for row in rows[:BATCH]:
            group = encode(tokenizer, row)
            for ids in group.completions:
                reward = reference.reward(saved, group.prompt, ids)
                wanted = reference.reward(trained, group.prompt, ids)
                torch.testing.assert_close(reward.double(), wanted, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- tokenizers like SentencePiece's

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that writes blanks as ▁, puts one before a text, and so encodes a text in another way behind others.

    "bpe" and "unigram" do so when they split a text into words, "prepended" before that, as Llama 2's does.
    """
    options = {"vocab_size": 300, "show_progress": False}
    if kind == "unigram":
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(special_tokens=SPECIAL, **options)
    if kind == "prepended":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")

    corpus = [text for row in tiny.make_rows(200, seed=1) for text in row.values()]
    backend.train_from_iterator(corpus, trainer)
    ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids[1:2])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def encode_together(tokenizer: PreTrainedTokenizerFast, row: dict) -> reference.Group:
    """Each completion as it is tokenised behind its prompt, as one text."""
    prompt = tokenizer.encode(row["prompt"])
    group = reference.Group(prompt, [], row, [], [])
    for text in reference.completions_of(row):
        together = tokenizer.encode(row["prompt"] + text)
        assert together[: len(prompt)] == prompt
        group.completions.append([*together[len(prompt) :], tokenizer.eos_token_id])
    return group


def make_rows(tokenizer: PreTrainedTokenizerFast, k: int) -> list[dict]:
    """Rows whose prompts keep their ids when a completion follows; in some, no blank stands between the two."""
    rows = []
    for row in tiny.make_rows(300, seed=40 + k, k=k, prompt_words=(1, 10), completion_words=(1, 8)):
        prompt = tokenizer.encode(row["prompt"])
        together = [tokenizer.encode(row["prompt"] + text) for text in reference.completions_of(row)]
        if all(ids[: len(prompt)] == prompt for ids in together):
            rows.append(row)
    return rows[:ROWS]


@pytest.mark.parametrize(
    "kind, algorithm, k",
    [("bpe", "dpo", 2), ("unigram", "dpo", 4), ("bpe", "sft", 1), ("prepended", "dpo", 2)],
)
def test_tokens_depend_on_what_stands_before(tmp_path: Path, kind: str, algorithm: str, k: int) -> None:
    """A completion has the ids that stand behind its prompt's, not those that it has alone."""
    tokenizer = make_tokenizer(kind)
    rows = make_rows(tokenizer, k)
    assert len(rows) == ROWS
    num_other_ids = 0
    for row in rows:
        expected = encode_together(tokenizer, row).completions
        num_other_ids += expected != reference.encode(tokenizer, row).completions
    assert num_other_ids > BATCH

    model = tiny.make_model(tmp_path / "model", "llama", vocab=len(tokenizer), seed=3)
    tokenizer.save_pretrained(model)
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    options: dict[str, Any] = {"encode": encode_together, "metrics": ()}
    loss = reference.sft()
    if algorithm == "dpo":
        options = {"encode": encode_together, "beta": BETA}
        loss = reference.dpo(BETA)
    compare_run(f"algos/{algorithm}.py", tmp_path / "out", model, data, loss, **options)


# ---------------------------------------------------------------- processes and micro-batches


@pytest.mark.parametrize("algorithm, data, options", [("dpo", "pairs", {}), ("sft", "answers", {"turns": "all"})])
def test_processes_and_micro_batches(
    folder: Path, tmp_path: Path, algorithm: str, data: str, options: dict[str, Any]
) -> None:
    """Two processes, and passes over a group or two, give the numbers of one process with one pass a step."""
    settings = {**OPTIONS, **options, "max_steps": 5, "batch_size": 5, "shuffle": True}
    settings |= {"model": folder / "model", "train_data": folder / f"{data}.jsonl"}

    def run(processes: int, budget: int) -> list[dict]:
        output_dir = tmp_path / f"{processes}-{budget}"
        script = f"algos/{algorithm}.py"
        harness.run(output_dir, script=script, processes=processes, micro_batch_tokens=budget, **settings)
        return tiny.training_lines(output_dir / "metrics.jsonl")

    plain = run(1, HUGE)
    for processes, budget in ((2, HUGE), (1, SMALL), (2, SMALL)):
        check_agreement(run(processes, budget), plain, 5, ("loss", "grad_norm"))
