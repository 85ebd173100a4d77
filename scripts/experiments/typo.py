"""TYPO, arXiv 2407.09072: its statements about trained models, tried where all answers can be listed, and on texts.

Answers: a Llama of 0.1M parameters answers prompts of three groups by one of three words (scripts/lab/answers.py). In
one group the SFT model imitates π*, in the others it does not: these are the paper's x_g, its x_b, and a bad prompt of
ours. Groups share all parameters. A policy's probabilities of the three answers are read from it on new prompts.

Texts: the world of omissions (world_a) in the place of HH, other writers' pairs, and the true reward in the place of
GPT-4.

DPO's β, IPO's τ and TYPO's λ are all λ here. All methods have the same pairs, learning rate and number of steps.

    python scripts/experiments/typo.py
    python scripts/experiments/typo.py --experiment C52
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from algos.dpo import dpo_loss
from algos.ipo import ipo_loss
from algos.typo import typo_loss
from scripts.lab.answers import GROUPS, Group, group_of
from scripts.lab.claims import Finding
from scripts.lab.commands import checked_command
from scripts.lab.experiments import (
    Args,
    Study,
    above_by_interval,
    below_by_interval,
    experiments_command,
    reported_with_interval,
)
from scripts.lab.interval_plots import draw_numbers
from scripts.lab.measured import logps_in, read, rewards_of, tensor_of
from scripts.lab.notices import words
from scripts.lab.pipeline import Artifact, Plan, Stage
from scripts.lab.plots import BLUE, GREEN, GREY, ORANGE, canvas, label_axes
from scripts.lab.qpo import Labelled, drawn_pairs, minimise_each
from scripts.lab.row_files import read_jsonl
from scripts.lab.statistics import Statistic, mean_over_seeds, over_seeds, win_rates
from scripts.lab.tabular import vector
from scripts.lab.worlds import OMISSION, world_a

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDY = Study("typo", "New Desiderata for Direct Preference Optimization (TYPO)")

METHODS = {"dpo": "DPO", "ipo": "IPO", "typo": "TYPO"}
RIVALS = ("dpo", "ipo")
STRENGTH = {"dpo": "--beta", "ipo": "--tau", "typo": "--lam"}
LAMS = (0.04, 0.2, 1.0, 5.0, 25.0)
LEAST = LAMS[0]
LARGEST = LAMS[-1]
ALONE = 1000.0  # a λ beside which ℓ_sup does not count
OF_TRANSFER = 1.0  # λ of the runs in which a group has no preferences
BATCH_SIZE = 64
STEPS = 72  # less than an epoch
DRAWING = "--max-new-tokens 2 --batch-size 2048"

# ---------------------------------------------------------------- answers: the runs


class Base(NamedTuple):
    """The rows of the answers, the SFT model, and two draws of it for each prompt."""

    seed: int
    world: Stage
    sft: Stage
    drawn: Artifact


def base(plan: Plan, seed: int) -> Base:
    world = plan.stage(f"typo/{seed}/world", f"scripts/answers.py world --output-dir {{out}} --seed {seed}")
    sft = plan.stage(
        f"typo/{seed}/sft",
        "algos/sft.py --model {base} --train-data {rows} --output-dir {out} --batch-size 128 --max-steps 256 "
        f"--learning-rate 3e-3 --warmup-steps 20 --save-every 0 --seed {seed}",
        base=world / "base",
        rows=world / "sft.jsonl",
    )
    drawn = plan.stage(
        f"typo/{seed}/drawn",
        "scripts/sample.py --model {sft} --rows {rows} --output {out}/rows.jsonl --num-completions 2 "
        f"{DRAWING} --seed {seed}",
        sft=sft,
        rows=world / "prompts.jsonl",
    )
    return Base(seed, world, sft, drawn / "rows.jsonl")


def labelled(plan: Plan, given: Base, name: str, flags: str = "", sampling: str = "") -> Artifact:
    """Pairs in the order of sampled preferences, with one sample of π_ref each."""
    pairs = plan.stage(
        f"typo/{given.seed}/pairs_{name}",
        f"scripts/answers.py prefer --rows {{rows}} --output {{out}}/rows.jsonl --seed {given.seed} {flags}",
        rows=given.drawn,
    )
    rows = plan.stage(
        f"typo/{given.seed}/rows_{name}",
        "scripts/sample.py --model {sft} --rows {pairs} --output {out}/rows.jsonl --reference-samples 1 "
        f"{DRAWING} --seed {given.seed} {sampling}",
        sft=given.sft,
        pairs=pairs / "rows.jsonl",
    )
    return rows / "rows.jsonl"


def trained(plan: Plan, given: Base, method: str, lam: float, rows: Artifact, name: str = "") -> Stage:
    """A policy that starts from the SFT model. `name` tells apart those on other rows."""
    return plan.stage(
        f"typo/{given.seed}/{method}_{lam:g}{name}",
        f"algos/{method}.py --model {{sft}} --train-data {{rows}} --output-dir {{out}} {STRENGTH[method]} {lam:g} "
        f"--batch-size {BATCH_SIZE} --max-steps {STEPS} --learning-rate 1e-3 --warmup-steps 5 --save-every 0 "
        f"--seed {given.seed}",
        sft=given.sft,
        rows=rows,
    )


class Readout(NamedTuple):
    """Held-out prompts with all their answers, and the log-probs of these under the policies."""

    held_out: Artifact
    logps: Artifact


def readout(plan: Plan, given: Base, name: str, policies: dict[str, Stage]) -> Readout:
    """Of these policies and the SFT model."""
    policies = {"sft": given.sft, **policies}
    held_out = given.world / "held_out.jsonl"
    names = " ".join(f"{policy}={{{policy}}}" for policy in policies)
    stage = plan.stage(
        f"typo/{given.seed}/{name}",
        f"scripts/logps.py --policies {names} --rows {{held_out}} --output {{out}}/logps.json",
        held_out=held_out,
        **policies,
    )
    return Readout(held_out, stage / "logps.json")


def sweep(plan: Plan, seed: int) -> Readout:
    """All methods at all λ."""
    given = base(plan, seed)
    rows = labelled(plan, given, "all")
    policies = {}
    for method in METHODS:
        for i, lam in enumerate(LAMS):
            policies[f"{method}_{i}"] = trained(plan, given, method, lam, rows)
    return readout(plan, given, "sweep", policies)


def terms(plan: Plan, seed: int) -> Readout:
    """Each of TYPO's terms alone."""
    given = base(plan, seed)
    rows = labelled(plan, given, "all")
    policies = {
        "supervised": trained(plan, given, "typo", 0.0, rows),
        "unsupervised": trained(plan, given, "typo", ALONE, rows),
    }
    return readout(plan, given, "terms", policies)


def transfer(plan: Plan, seed: int) -> Readout:
    """TYPO and DPO without a pair on good prompts, and TYPO with their samples alone."""
    given = base(plan, seed)
    without = labelled(plan, given, "without_good", "--without good")
    unlabelled = labelled(plan, given, "unlabelled_good", "--unlabelled good")
    policies = {
        "dpo_without": trained(plan, given, "dpo", OF_TRANSFER, without, "_without_good"),
        "typo_without": trained(plan, given, "typo", OF_TRANSFER, without, "_without_good"),
        "typo_unlabelled": trained(plan, given, "typo", OF_TRANSFER, unlabelled, "_unlabelled_good"),
    }
    return readout(plan, given, "transfer", policies)


def truncation(plan: Plan, seed: int) -> Readout:
    """ℓ_unsup alone on samples as the paper draws them, and on plain ones."""
    given = base(plan, seed)
    plain = labelled(plan, given, "all")
    truncated = labelled(plan, given, "truncated", sampling="--top-k 60 --top-p 0.8 --repetition-penalty 1.1")
    policies = {
        "plain": trained(plan, given, "typo", ALONE, plain),
        "truncated": trained(plan, given, "typo", ALONE, truncated, "_truncated"),
    }
    return readout(plan, given, "truncation", policies)


# ---------------------------------------------------------------- answers: the numbers


class Answered(NamedTuple):
    """The probabilities of the first, second, third answer and of all other texts, (n, 4), of each policy."""

    groups: list[str]
    policies: dict[str, Tensor]

    def of(self, policy: str, group: str) -> Tensor:
        """On the prompts of a group."""
        is_there = torch.tensor([name == group for name in self.groups])
        return self.policies[policy][is_there]

    def distance(self, policy: str, group: str) -> Tensor:
        """The total variation to π* of each prompt of a group, (n,)."""
        return total_variations(self.of(policy, group), target_of(group))

    def shift(self, policy: str, group: str) -> Tensor:
        """The total variation to the SFT model."""
        return total_variations(self.of(policy, group), self.of("sft", group))


def answered(run: Readout) -> Answered:
    """What a stage has read."""
    groups = [group_of(row["prompt"]) for row in read_jsonl(run.held_out.path)]
    policies = {}
    for name, logps in logps_in(run.logps).items():
        policies[name] = with_the_rest(logps.exp())
    return Answered(groups, policies)


def with_the_rest(chances: Tensor) -> Tensor:
    """Probabilities of answers and, behind them, of everything else, (n, 3) → (n, 4)."""
    rest = 1 - chances.sum(1, keepdim=True)
    return torch.cat([chances, rest], 1)


def target_of(group: str) -> Tensor:
    """π*, with nothing for other texts."""
    return vector(*GROUPS[group].pi_star, 0)


def total_variations(p: Tensor, q: Tensor) -> Tensor:
    """The distance of each row of `p`, (..., n), to that of `q`, (..., n) or (n,): (...,)."""
    return (p - q).abs().sum(-1) / 2


def change(runs: Sequence[Answered], policy: str, group: str) -> dict:
    """How much farther from π* a policy is than the SFT model."""
    return mean_over_seeds([run.distance(policy, group) - run.distance("sft", group) for run in runs])


def distance(runs: Sequence[Answered], policy: str, group: str) -> dict:
    return mean_over_seeds([run.distance(policy, group) for run in runs])


def shift(runs: Sequence[Answered], policy: str, group: str) -> dict:
    return mean_over_seeds([run.shift(policy, group) for run in runs])


def likeliest_share(policies: Tensor) -> Tensor:
    """The largest of the answers' probabilities, when they are to sum to 1: (n, 4) → (n,)."""
    chances = policies[:, :-1]
    return chances.amax(1) / chances.sum(1)


def rest_of(runs: Sequence[Answered], policy: str) -> dict:
    """The probability of what is no answer, over all groups."""
    return mean_over_seeds([run.policies[policy][:, -1] for run in runs])


def lam_text(method: str, i: int) -> str:
    return f"{METHODS[method]}, λ = {LAMS[i]:g}"


# ---------------------------------------------------------------- answers: the optimum of a bandit


def bandit_optima(method: str, group: Group, lams: Sequence[float]) -> Tensor:
    """The optimum of each λ for a policy that is free at each prompt, with pairs as in Eq 1: (number of λ, 3)."""
    pi_ref = vector(*group.pi_ref)
    data = drawn_pairs(vector(*group.pi_star), pi_ref)

    def loss(logits: Tensor, lam: float) -> Tensor:
        losses = losses_of(method, logits.log_softmax(0), pi_ref, data, lam)
        return (data.weights * losses).sum()

    strengths = vector(*lams)
    starts = pi_ref.log().expand(len(strengths), -1)
    return minimise_each(loss, starts, strengths).softmax(1)


def losses_of(method: str, logps: Tensor, pi_ref: Tensor, data: Labelled, lam: float) -> Tensor:
    """The loss of each pair."""
    pairs = logps[data.pairs]
    if method == "dpo":
        return dpo_loss(pairs, pi_ref.log()[data.pairs], lam)
    if method == "ipo":
        return ipo_loss(pairs, pi_ref.log()[data.pairs], lam)
    # linear in the samples' log-probs, whose expectation stands for the samples
    expected_logp = (pi_ref * logps).sum()
    return typo_loss(pairs, expected_logp.expand(len(pairs), 1), lam)


# ---------------------------------------------------------------- texts: the runs

TEXT_STEPS = 40
TEXT_BATCH = 32
TEXT_PAIRS = 2_000  # more than are used, as some have equal rewards
NUM_POSTS = 192  # held-out
LENGTH = "--max-new-tokens 48 --batch-size 512"
OF_THE_PAPER = {"dpo": 0.1, "ipo": 0.1, "typo": 0.05}
PREFERENCES = {"sampled": "", "clean": "--noise-free"}  # as people prefer, and as the reward ranks


class Texts(NamedTuple):
    """The evaluation of the policies, and pairs with their log-probs under the SFT model and DPO."""

    results: Artifact
    pairs: Artifact
    logps: Artifact


def texts(plan: Plan, seed: int) -> Texts:
    """The SFT model, and all methods on sampled preferences and on noise-free ones."""
    notices, sft = world_a(plan, seed)
    test = written_pairs(plan, seed, "test", NUM_POSTS, 2000 + seed)
    held_out = text_preferences(plan, seed, "test", test, "sampled")
    policies: dict[str, Stage] = {"sft": sft}
    written = written_pairs(plan, seed, "written", TEXT_PAIRS, 3000 + seed, test)
    for kind in PREFERENCES:
        rows = text_rows(plan, seed, text_preferences(plan, seed, "written", written, kind), kind)
        for method in METHODS:
            policies[f"{method}_{kind}"] = trained_on_texts(plan, seed, method, kind, rows)

    names = " ".join(f"{policy}={{{policy}}}" for policy in policies)
    results = plan.stage(
        f"typo/{seed}/texts",
        f"scripts/evaluate.py --policies {names} --rows {{held_out}} --output {{out}}/results.json --against-rows "
        f"--num-prompts {NUM_POSTS} --num-samples 2 {LENGTH} --seed {seed}",
        held_out=held_out,
        **policies,
    )
    logps = plan.stage(
        f"typo/{seed}/text_logps",
        "scripts/logps.py --policies sft={sft} dpo={dpo} --rows {held_out} --output {out}/logps.json",
        sft=sft,
        dpo=policies["dpo_sampled"],
        held_out=held_out,
    )
    return Texts(results / "results.json", held_out, logps / "logps.json")


def written_pairs(plan: Plan, seed: int, name: str, number: int, posts: int, other: Artifact | None = None) -> Artifact:
    """New posts with two demonstrations each, by other writers than the SFT model. `posts` is the seed of the posts."""
    exclude: dict[str, Stage | Artifact] = {"sft": world_a(plan, seed).notices / "sft.jsonl"}
    if other is not None:
        exclude["other"] = other
    stage = plan.stage(
        f"typo/{seed}/texts_{name}",
        f"scripts/notices.py pairs --output {{out}}/rows.jsonl --rows {number} --seed {posts} {OMISSION} "
        f"--exclude {' '.join(f'{{{placeholder}}}' for placeholder in exclude)}",
        **exclude,
    )
    return stage / "rows.jsonl"


def text_preferences(plan: Plan, seed: int, name: str, rows: Artifact, kind: str) -> Artifact:
    stage = plan.stage(
        f"typo/{seed}/texts_{name}_{kind}",
        f"scripts/notices.py prefer --rows {{rows}} --output {{out}}/rows.jsonl --seed {seed} {PREFERENCES[kind]}",
        rows=rows,
    )
    return stage / "rows.jsonl"


def text_rows(plan: Plan, seed: int, pairs: Artifact, kind: str) -> Artifact:
    """The pairs with one sample of π_ref each. Samples are plain, as the equation has them."""
    stage = plan.stage(
        f"typo/{seed}/texts_rows_{kind}",
        "scripts/sample.py --model {sft} --rows {pairs} --output {out}/rows.jsonl --reference-samples 1 "
        f"--max-rows {TEXT_STEPS * TEXT_BATCH} {LENGTH} --seed {seed}",
        sft=world_a(plan, seed).sft,
        pairs=pairs,
    )
    return stage / "rows.jsonl"


def trained_on_texts(plan: Plan, seed: int, method: str, kind: str, rows: Artifact) -> Stage:
    """A policy with the paper's hyper-parameter."""
    return plan.stage(
        f"typo/{seed}/texts_{method}_{kind}",
        f"algos/{method}.py --model {{sft}} --train-data {{rows}} --output-dir {{out}} {STRENGTH[method]} "
        f"{OF_THE_PAPER[method]:g} --batch-size {TEXT_BATCH} --max-steps {TEXT_STEPS} --learning-rate 3e-4 "
        f"--warmup-steps 4 --save-every 0 --seed {seed}",
        sft=world_a(plan, seed).sft,
        rows=rows,
    )


# ---------------------------------------------------------------- preservation

KEPT = 0.05  # a change of the distance that counts as none
MODERATE = range(len(LAMS) - 1)  # places of all λ but the largest


@STUDY.experiment("C52", "§3.1, Fig. 3", sweep)
def typo_keeps_good_prompts(runs: list[Readout]) -> Iterator[Finding]:
    """A language model keeps good prompts and improves bad ones with TYPO.

    The distance to π* on new prompts, less that of the SFT model, at four λ from 0.04 to 5; at λ = 25 hardly anything
    moves. Kept: by less than 0.05 farther. DPO and IPO must lose on good prompts wherever a bandit's optimum is at
    least 0.02 farther from π* than π_ref. The bad prompts are ours: at the paper's own x_b no λ of DPO or IPO can gain
    (docs/errata.md). The groups share all parameters, so that no prompt is independent of the others, as it is in the
    proof of Prop 4.1.
    """
    outcomes = [answered(run) for run in runs]
    for i in MODERATE:
        policy = f"typo_{i}"
        yield below_by_interval(f"{lam_text('typo', i)}, good prompts", KEPT, change(outcomes, policy, "good"), ".3f")
        for group in ("bad", "tied"):
            name = title_of(group)
            yield below_by_interval(f"{lam_text('typo', i)}, {name}", 0, change(outcomes, policy, group), ".3f")
    for method in RIVALS:
        for i in MODERATE:
            policy = f"{method}_{i}"
            name = f"{lam_text(method, i)}, good prompts"
            number = change(outcomes, policy, "good")
            if loss_of_bandits(method, "good", LAMS[i]) > 0.02:
                yield above_by_interval(name, 0, number, ".3f")
            else:
                yield reported_with_interval(name, number, ".3f")
            for group in ("bad", "tied"):
                number = change(outcomes, policy, group)
                yield reported_with_interval(f"{lam_text(method, i)}, {title_of(group)}", number, ".3f")
    for group in GROUPS:
        yield reported_with_interval(f"SFT, {title_of(group)}: distance", distance(outcomes, "sft", group), ".3f")


def loss_of_bandits(method: str, group: str, lam: float) -> float:
    """How much farther from π* than π_ref the optimum of a policy is that is free at each prompt."""
    setting = GROUPS[group]
    optimum = bandit_optima(method, setting, [lam])[0]
    distances = [total_variations(policy, vector(*setting.pi_star)) for policy in (optimum, vector(*setting.pi_ref))]
    return float(distances[0] - distances[1])


def title_of(group: str) -> str:
    """Its name in tables and figures."""
    return {"good": "good prompts", "bad": "bad prompts", "tied": "the paper's x_b"}[group]


# ---------------------------------------------------------------- interpolation


@STUDY.experiment("C53", "Fig. 6", sweep)
def models_interpolate_as_bandits(runs: list[Readout]) -> Iterator[Finding]:
    """The optima of a language model interpolate as the bandits' do.

    λ → 0 is 0.04 and λ → ∞ is 25; x_b, whose π* has two modes, is left out. Near is a total variation below 0.1. The
    likeliest answer's share is among the answers. A bandit has nothing but answers: whatever else a policy of DPO or
    IPO writes, neither a pair nor π_ref says, and at small λ the likelihood of both answers of a pair falls.
    """
    outcomes = [answered(run) for run in runs]
    smallest, largest = 0, len(LAMS) - 1
    for group in ("good", "bad"):
        number = distance(outcomes, f"typo_{smallest}", group)
        yield below_by_interval(f"TYPO, λ = {LEAST:g}, {title_of(group)}: distance to π*", 0.1, number, ".3f")
    for method in RIVALS:
        for group in ("good", "bad"):
            shares = [likeliest_share(run.of(f"{method}_{smallest}", group)) for run in outcomes]
            number = mean_over_seeds(shares)
            name = f"{METHODS[method]}, λ = {LEAST:g}, {title_of(group)}: likeliest answer's share"
            yield above_by_interval(name, 0.9, number, ".3f")
        number = rest_of(outcomes, f"{method}_{smallest}")
        yield below_by_interval(f"{METHODS[method]}, λ = {LEAST:g}: share of no answers", 0.1, number, ".3f")
    for method in METHODS:
        for group in ("good", "bad"):
            number = shift(outcomes, f"{method}_{largest}", group)
            name = f"{METHODS[method]}, λ = {LARGEST:g}, {title_of(group)}: distance to π_ref"
            yield below_by_interval(name, 0.1, number, ".3f")
    for method in METHODS:
        number = distance_to_bandits(outcomes, method)
        yield reported_with_interval(f"{METHODS[method]}: distance to the bandit's optimum, all λ", number, ".3f")


def distance_to_bandits(runs: Sequence[Answered], method: str) -> dict:
    """The distance to the optimum of a policy that is free at each prompt, over all groups and λ."""
    distances = []
    for run in runs:
        of_run = []
        for group, setting in GROUPS.items():
            for i, optimum in enumerate(bandit_optima(method, setting, LAMS)):
                target = torch.cat([optimum, vector(0)])
                of_run.append(total_variations(run.of(f"{method}_{i}", group), target))
        distances.append(torch.stack(of_run).mean(0))
    return mean_over_seeds(distances)


# ---------------------------------------------------------------- ablations


@STUDY.experiment("C57", "Eqs 14, 16, 17", terms, quick=True)
def each_term_goes_to_its_own_end(runs: list[Readout]) -> Iterator[Finding]:
    """Alone, a language model's ℓ_sup leads to π* from any π_ref, and its ℓ_unsup leads back to π_ref.

    λ = 0, and λ = 1000 for ℓ_unsup. Near is a total variation below 0.1. ℓ_sup compares answers and says nothing on
    how likely all of them are together; what is no answer is reported.
    """
    outcomes = [answered(run) for run in runs]
    for group in GROUPS:
        number = distance(outcomes, "supervised", group)
        yield below_by_interval(f"ℓ_sup, {title_of(group)}: distance to π*", 0.1, number, ".3f")
    for group in GROUPS:
        number = shift(outcomes, "unsupervised", group)
        yield below_by_interval(f"ℓ_unsup, {title_of(group)}: distance to π_ref", 0.1, number, ".3f")
    for policy, name in (("sft", "SFT"), ("supervised", "ℓ_sup"), ("unsupervised", "ℓ_unsup")):
        yield reported_with_interval(f"{name}: share of no answers", rest_of(outcomes, policy), ".4f")


@STUDY.experiment("C58", "§4.1", transfer)
def unlabelled_prompts_serve(runs: list[Readout]) -> Iterator[Finding]:
    """Prompts without preferences can serve in ℓ_unsup, and their good policy is preserved.

    No pair is on a good prompt, and λ = 1. Either good prompts are left out, or their samples are in ℓ_unsup, beside a
    pair of two words that are no answers in a random order (algos/typo.py takes no row without a pair). DPO has no such
    term.
    """
    outcomes = [answered(run) for run in runs]
    differences = []
    for run in outcomes:
        differences.append(run.distance("typo_unlabelled", "good") - run.distance("typo_without", "good"))
    number = mean_over_seeds(differences)
    yield below_by_interval("TYPO with good prompts in ℓ_unsup less without them, good prompts", 0, number, ".3f")
    number = change(outcomes, "typo_unlabelled", "good")
    yield below_by_interval("with them, good prompts less SFT", KEPT, number, ".3f")
    number = change(outcomes, "typo_unlabelled", "bad")
    yield below_by_interval("with them, bad prompts less SFT", 0, number, ".3f")
    for policy, name in (("typo_without", "TYPO without them"), ("dpo_without", "DPO without them")):
        for group in ("good", "bad"):
            number = change(outcomes, policy, group)
            yield reported_with_interval(f"{name}, {title_of(group)} less SFT", number, ".3f")


@STUDY.experiment("C59", "App. A.3", truncation)
def truncated_samples_serve(runs: list[Readout]) -> Iterator[Finding]:
    """Samples with top-k 60, top-p 0.8 and a repetition penalty of 1.1 serve as those of π_ref.

    TYPO with λ = 1000, so that ℓ_unsup alone counts. It is to stay at π_ref, by less than 0.05 in total variation, as
    it does with plain samples. Top-p 0.8 cuts the least likely of the three answers wherever the two others have 80%.
    """
    outcomes = [answered(run) for run in runs]
    for group in GROUPS:
        number = shift(outcomes, "truncated", group)
        yield below_by_interval(f"truncated samples, {title_of(group)}: distance to π_ref", KEPT, number, ".3f")
    for group in GROUPS:
        number = shift(outcomes, "plain", group)
        yield reported_with_interval(f"plain samples, {title_of(group)}", number, ".3f")


# ---------------------------------------------------------------- texts


def wins_of(run: Texts, policy: str) -> Tensor:
    """The win rate of a policy's samples against each post's chosen summary, (n,); a tie counts half."""
    results = read(run.results)
    rewards = rewards_of(results["policies"][policy])
    chosen = tensor_of(results["row_rewards"]).unsqueeze(1)
    return win_rates(rewards, chosen)


def win_difference(runs: Sequence[Texts], ours: str, theirs: str) -> dict:
    return mean_over_seeds([wins_of(run, ours) - wins_of(run, theirs) for run in runs])


@STUDY.experiment("C50", "Fig. 4", texts)
def typo_wins_more_often(runs: list[Texts]) -> Iterator[Finding]:
    """On Anthropic HH, TYPO wins more often against the chosen response.

    Here the world of omissions, sampled preferences of other writers' summaries, the true reward as the judge, and the
    paper's λ: 0.1, 0.1 and 0.05. With noise-free preferences, which tell apart what is good more sharply, the win rates
    are reported: TYPO's optimum is the π* of the preferences, and sampled ones have a π* that is hardly better than
    the demonstrations. With these TYPO gains over SFT, and stays behind the others. Its ℓ_sup has no reference, so that
    it compares lengths as much as contents (C56).
    """
    for rival in RIVALS:
        number = win_difference(runs, "typo_sampled", f"{rival}_sampled")
        yield above_by_interval(f"TYPO less {METHODS[rival]}, win rate", 0, number, ".3f")
    yield above_by_interval("TYPO less SFT, win rate", 0, win_difference(runs, "typo_sampled", "sft"), ".3f")
    yield reported_with_interval("SFT, win rate", mean_over_seeds([wins_of(run, "sft") for run in runs]), ".3f")
    for kind, name in (("sampled", ""), ("clean", ", noise-free")):
        for method, title in METHODS.items():
            number = mean_over_seeds([wins_of(run, f"{method}_{kind}") for run in runs])
            yield reported_with_interval(f"{title}{name}, win rate", number, ".3f")


@STUDY.experiment("C56", "Eq 16", texts)
def pairs_become_comparisons_of_lengths(runs: list[Texts]) -> Iterator[Finding]:
    """Without a reference, ℓ_sup on long texts becomes a comparison of lengths.

    The share of the variance of log π(y_w) - log π(y_l) that the difference of the numbers of tokens explains, under
    the SFT model, on held-out pairs. Of DPO's log-ratios, whose reference takes the lengths away, it is reported.
    Texts here have about fifteen tokens, long ones more.
    """
    columns = [margins_and_lengths(run) for run in runs]
    of_sft = [margins.sft for margins in columns]
    ratios = [margins.ratios for margins in columns]
    lengths = [margins.lengths for margins in columns]
    yield above_by_interval("explained by lengths, ℓ_sup's margin", 0.5, explained(of_sft, lengths))
    yield reported_with_interval("explained by lengths, DPO's margin", explained(ratios, lengths))


class Margins(NamedTuple):
    """Of n pairs, the preferred one less the other: log π of SFT, DPO's log-ratio, the number of tokens, (n,) each."""

    sft: Tensor
    ratios: Tensor
    lengths: Tensor


def margins_and_lengths(run: Texts) -> Margins:
    """The margins of the held-out pairs."""
    logps = {name: pairs[:, 0] - pairs[:, 1] for name, pairs in logps_in(run.logps).items()}
    lengths = []
    for row in read_jsonl(run.pairs.path)[: len(logps["sft"])]:
        lengths.append(len(words(row["chosen"])) - len(words(row["rejected"])))
    return Margins(logps["sft"], logps["dpo"] - logps["sft"], tensor_of(lengths))


def explained(margins: Sequence[Tensor], lengths: Sequence[Tensor]) -> dict:
    """The share of the margins' variance that lengths explain linearly, the squared correlation."""
    statistics = [squared_correlation(y, x) for y, x in zip(margins, lengths, strict=True)]
    return over_seeds(statistics, [len(y) for y in margins])


def squared_correlation(y: Tensor, x: Tensor) -> Statistic:
    """The squared correlation of two columns (n,), as a function of how often each row counts."""

    def statistic(counts: Tensor) -> Tensor:
        weights = counts / counts.sum(1, keepdim=True)

        def covariance(a: Tensor, b: Tensor) -> Tensor:
            return weights @ (a * b) - (weights @ a) * (weights @ b)

        return covariance(x, y) ** 2 / (covariance(x, x) * covariance(y, y))

    return statistic


# ---------------------------------------------------------------- figures

COLORS = {"dpo": BLUE, "ipo": ORANGE, "typo": GREEN}
ANSWER_COLORS = (BLUE, ORANGE, GREEN, GREY)
ANSWER_NAMES = ("first answer", "second answer", "third answer", "no answer")
FINE = tuple(10 ** (-1.5 + i / 20) for i in range(61))  # λ of the bandits' curves, 0.03 to 32


@STUDY.figure(
    "Preservation (Fig. 3): the distance of a transformer's policies to π* on new prompts, with 95% intervals. Lines: "
    "the optima of the bandits. Grey: the SFT model. TYPO alone keeps good prompts and improves bad ones.",
    sweep,
)
def preservation(runs: list[Readout]) -> "Figure":
    outcomes = [answered(run) for run in runs]
    figure, panels = canvas([list(GROUPS)], (12, 3.8))
    for group, axes in panels.items():
        for method, title in METHODS.items():
            optima = bandit_optima(method, GROUPS[group], FINE)
            curve = total_variations(optima, vector(*GROUPS[group].pi_star))
            axes.semilogx(FINE, curve, color=COLORS[method], linewidth=1)
            numbers = [distance(outcomes, f"{method}_{i}", group) for i in range(len(LAMS))]
            draw_numbers(axes, LAMS, numbers, color=COLORS[method], label=title, fmt="o")
        axes.axhline(distance(outcomes, "sft", group)["mean"], color=GREY, linestyle="--", linewidth=1, label="SFT")
        axes.set_ylim(0, 1)
        label_axes(axes, title_of(group), "λ (no unit)", "distance to π* (total variation)")
    return figure


@STUDY.figure(
    "Interpolation (Figs. 5, 6): the probabilities of the answers against λ, with 95% intervals. Lines: the optima of "
    "the bandits. Triangles: π* at the left, the policy that SFT imitates at the right. The models' DPO and IPO also "
    "write what is no answer.",
    sweep,
)
def interpolation(runs: list[Readout]) -> "Figure":
    outcomes = [answered(run) for run in runs]
    names = [[f"{group} {method}" for method in METHODS] for group in ("good", "bad")]
    figure, panels = canvas(names, (12, 7))
    for name, axes in panels.items():
        group, method = name.split(" ")
        setting = GROUPS[group]
        optima = bandit_optima(method, setting, FINE)
        for answer in range(4):
            columns = [
                mean_over_seeds([run.of(f"{method}_{i}", group)[:, answer] for run in outcomes]) for i in range(5)
            ]
            draw_numbers(axes, LAMS, columns, color=ANSWER_COLORS[answer], label=ANSWER_NAMES[answer], fmt="o")
            if answer < 3:
                color = ANSWER_COLORS[answer]
                axes.semilogx(FINE, optima[:, answer], color=color, linewidth=1)
                axes.plot(FINE[0], setting.pi_star[answer], "<", color=color, clip_on=False)
                axes.plot(FINE[-1], setting.pi_ref[answer], ">", color=color, clip_on=False)
        axes.set_ylim(-0.03, 1.03)
        label_axes(axes, f"{METHODS[method]}, {title_of(group)}", "λ (no unit)", "probability")
    return figure


@STUDY.figure(
    "Win rates against the chosen summaries by the true reward (Fig. 4), with 95% intervals, after training on sampled "
    "and on noise-free preferences.",
    texts,
)
def text_win_rates(runs: list[Texts]) -> "Figure":
    figure, panels = canvas([list(PREFERENCES)], (8, 3.4))
    titles = {"sampled": "Sampled preferences", "clean": "Noise-free preferences"}
    for kind, axes in panels.items():
        policies = {"SFT": "sft"} | {title: f"{method}_{kind}" for method, title in METHODS.items()}
        for i, policy in enumerate(policies.values()):
            number = mean_over_seeds([wins_of(run, policy) for run in runs])
            draw_numbers(axes, [i], [number], color=COLORS.get(policy.partition("_")[0], GREY), label="", fmt="o")
        axes.set_xticks(range(len(policies)), list(policies))
        axes.axhline(0.5, color=GREY, linewidth=0.7)
        axes.set_ylim(0, 1)
        label_axes(axes, titles[kind], "", "win rate against chosen")
    return figure


def main(args: Args) -> None:
    """Run the experiments."""
    experiments_command(STUDY, args)


if __name__ == "__main__":
    checked_command(main, Args)
